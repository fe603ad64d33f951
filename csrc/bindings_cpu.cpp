// The Python door of the CPU code: checks, unpacks, calls. Kernels take tensors and check them; `uniforms` takes
// addresses (int) that Python has checked for device, dtype and layout, 0 for "none". The GIL is released around the
// work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/isa.hpp"
#include "common/philox.hpp"
#include "thought_attention/binding.hpp"
#include "thought_attention/cpu.hpp"

namespace py = pybind11;

namespace {

using namespace pyquiet;

// The address of int64 [rows], or 0 and one value for all rows.
using Field = std::pair<uintptr_t, int64_t>;

CounterField checked(const char* name, const Field& field, int64_t rows, int64_t limit) {
  const CounterField words{reinterpret_cast<const int64_t*>(field.first), field.second};
  for (int64_t r = 0; r < (words.rows ? rows : 1); ++r) {
    const int64_t x = words.at(r);
    if (x >= 0 && x < limit) continue;
    throw std::invalid_argument("stream." + std::string(name) + " must be in [0, " + std::to_string(limit) + "), got " +
                                std::to_string(x) + " at row " + std::to_string(r));
  }
  return words;
}

// out: double [rows].
void fill_uniforms(uintptr_t out, int64_t rows, uint64_t seed, uint32_t purpose, const Field& sequence,
                   const Field& position, const Field& step, const Field& index) {
  py::gil_scoped_release release;
  constexpr int64_t kWords = int64_t{1} << 32, kIndices = int64_t{1} << 26;
  const Stream stream{seed,
                      purpose,
                      checked("sequence", sequence, rows, kWords),
                      checked("position", position, rows, kWords),
                      checked("step", step, rows, kWords),
                      checked("index", index, rows, kIndices)};
  uniforms(stream, reinterpret_cast<double*>(out), rows);
}

std::array<uint32_t, 4> philox_words(uint64_t seed, const std::array<uint32_t, 4>& counter) {
  const PhiloxBlock block = philox(seed, {{counter[0], counter[1], counter[2], counter[3]}});
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
}

template <class E>
bool forward_as(const ThoughtArguments& arguments, py::handle out, py::handle lse, int threads) {
  ThoughtAttention<E> a;
  if (!read_forward(arguments, out, lse, Device::cpu, a)) return false;
#define PYQUIET_ROW(level) &level::thought_attention_forward<E>,
  constexpr void (*kForward[])(const ThoughtAttention<E>&, int) = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
#undef PYQUIET_ROW
  py::gil_scoped_release release;
  kForward[isa_index()](a, threads);
  return true;
}

// False, with nothing written, where an argument breaks the contract; Python then says which and how.
bool thought_attention(py::handle query, py::handle text_key, py::handle text_value, py::handle path_key,
                       py::handle path_value, py::handle text_limits, py::handle text_start, double scale,
                       py::handle window, py::handle softcap, py::handle out, py::handle lse, int threads) {
  const ThoughtArguments a{query,       text_key,   text_value, path_key, path_value,
                           text_limits, text_start, scale,      window,   softcap};
  return forward_as<float>(a, out, lse, threads) || forward_as<BFloat16>(a, out, lse, threads);
}

template <class E>
bool backward_as(const ThoughtArguments& arguments, const std::array<py::handle, 3>& saved,
                 const std::array<py::handle, 5>& gradients, int threads) {
  ThoughtAttentionBackward<E> a;
  if (!read_backward(arguments, saved, gradients, Device::cpu, a)) return false;
#define PYQUIET_ROW(level) &level::thought_attention_backward<E>,
  constexpr void (*kBackward[])(const ThoughtAttentionBackward<E>&, int) = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
#undef PYQUIET_ROW
  py::gil_scoped_release release;
  kBackward[isa_index()](a, threads);
  return true;
}

bool thought_attention_backward(py::handle query, py::handle text_key, py::handle text_value, py::handle path_key,
                                py::handle path_value, py::handle text_limits, py::handle text_start, double scale,
                                py::handle window, py::handle softcap, py::handle out, py::handle d_out, py::handle lse,
                                py::handle d_query, py::handle d_text_key, py::handle d_text_value,
                                py::handle d_path_key, py::handle d_path_value, int threads) {
  const ThoughtArguments a{query,       text_key,   text_value, path_key, path_value,
                           text_limits, text_start, scale,      window,   softcap};
  const std::array<py::handle, 3> saved{out, d_out, lse};
  const std::array<py::handle, 5> gradients{d_query, d_text_key, d_text_value, d_path_key, d_path_value};
  return backward_as<float>(a, saved, gradients, threads) || backward_as<BFloat16>(a, saved, gradients, threads);
}

int openmp_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  choose_isa(std::getenv("PYQUIET_ISA"));

  m.doc() = "CPU kernels of pyquiet. Import it through pyquiet.native, which loads torch's OpenMP first.";
  m.def("isa", [] { return isa_name(isa()); });
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("openmp_threads", &openmp_threads, "Threads of the OpenMP runtime, 0 without OpenMP.");
  m.def("philox", &philox_words, py::arg("seed"), py::arg("counter"));
  m.def("uniforms", &fill_uniforms);
  m.def("thought_attention", &thought_attention);
  m.def("thought_attention_backward", &thought_attention_backward);
}
