// The Python door of the CPU code: checks, unpacks, calls. Kernels take tensors and check them; `uniforms` takes
// addresses (int) that Python has checked for device, dtype and layout, 0 for "none". The GIL is released around the
// work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <utility>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/isa.hpp"
#include "common/philox.hpp"
#include "draft_verification/binding.hpp"
#include "draft_verification/cpu.hpp"
#include "importance_resampling/binding.hpp"
#include "importance_resampling/cpu.hpp"
#include "thought_attention/binding.hpp"
#include "thought_attention/cpu.hpp"

namespace py = pybind11;

namespace {

using namespace pyquiet;

// The address of int64 [rows], or 0 and one value for all rows.
using Field = std::pair<uintptr_t, int64_t>;

// out: double [rows].
void fill_uniforms(uintptr_t out, int64_t rows, uint64_t seed, uint32_t purpose, const Field& sequence,
                   const Field& position, const Field& step, const Field& index) {
  py::gil_scoped_release release;
  const auto field = [](const Field& f) { return CounterField{reinterpret_cast<const int64_t*>(f.first), f.second}; };
  const Stream stream{seed, purpose, field(sequence), field(position), field(step), field(index)};
  check_stream(stream, rows, 0, 0);
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

template <class E>
int verify_as(const VerificationArguments& arguments, int threads) {
  DraftVerification<E> a;
  if (!read_verification(arguments, Device::cpu, a)) return -1;
#define PYQUIET_ROW(level) &level::verify_draft<E>,
  constexpr void (*kVerify[])(const DraftVerification<E>&, int) = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
#undef PYQUIET_ROW
  py::gil_scoped_release release;
  kVerify[isa_index()](a, threads);
  return faults(a.fault);
}

// How many sequences have a fault; -1, with nothing written, where an argument breaks the contract.
int verify_draft(py::handle target, py::handle draft, py::handle draft_tokens, py::handle draft_lse, py::handle banned,
                 py::handle lengths, py::handle sequence, py::handle position, py::handle step, py::handle index,
                 const std::array<int64_t, 4>& words, int64_t seed, double temperature, double draft_temperature,
                 py::handle top_k, py::handle top_p, bool first_is_exact, bool gumbel, bool deterministic,
                 py::handle tokens, py::handle count, py::handle accepted, py::handle log_probs, py::handle bonus,
                 py::handle fault, int threads) {
  const VerificationArguments a{target,
                                draft,
                                draft_tokens,
                                draft_lse,
                                lengths,
                                {{sequence, position, step, index}, words, static_cast<uint64_t>(seed), 0},
                                {banned, temperature, top_k, top_p},
                                draft_temperature,
                                first_is_exact,
                                gumbel,
                                deterministic,
                                {tokens, count, accepted, log_probs, bonus, fault}};
  const int floats = verify_as<float>(a, threads);
  return floats >= 0 ? floats : verify_as<BFloat16>(a, threads);
}

template <class E>
int draw_as(const CandidateArguments& arguments, int threads) {
  CandidateDraw<E> a;
  if (!read_candidates(arguments, Device::cpu, a)) return -1;
#define PYQUIET_ROW(level) &level::draw_candidates<E>,
  constexpr void (*kDraw[])(const CandidateDraw<E>&, int) = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
#undef PYQUIET_ROW
  py::gil_scoped_release release;
  kDraw[isa_index()](a, threads);
  return faults(a.fault);
}

int draw_as_either(const CandidateArguments& arguments, int threads) {
  const int floats = draw_as<float>(arguments, threads);
  return floats >= 0 ? floats : draw_as<BFloat16>(arguments, threads);
}

// How many rows have a fault; -1, with nothing written, where an argument breaks the contract.
int draw_candidates(py::handle logits, py::handle banned, py::handle sequence, py::handle position, py::handle step,
                    py::handle index, const std::array<int64_t, 4>& words, int64_t seed, uint32_t purpose, int64_t k,
                    double temperature, py::handle top_k, py::handle top_p, bool deterministic, py::handle tokens,
                    py::handle log_probs, py::handle log_base, py::handle lse, py::handle fault, int threads) {
  const StreamArguments stream{{sequence, position, step, index}, words, static_cast<uint64_t>(seed), purpose};
  const ProcessingArguments law{banned, temperature, top_k, top_p};
  return draw_as_either(
      {logits, stream, law, k, false, deterministic, tokens, log_probs, log_base, lse, py::none(), fault}, threads);
}

// The same of one draw a row, tokens and log_probs [R, 1]; lse is that of the law.
int draw(py::handle logits, py::handle banned, py::handle sequence, py::handle position, py::handle step,
         py::handle index, const std::array<int64_t, 4>& words, uint64_t seed, uint32_t purpose, double temperature,
         py::handle top_k, py::handle top_p, bool gumbel, py::handle tokens, py::handle log_probs, py::handle lse,
         py::handle fault, int threads) {
  const StreamArguments stream{{sequence, position, step, index}, words, seed, purpose};
  const ProcessingArguments law{banned, temperature, top_k, top_p};
  return draw_as_either({logits, stream, law, 1, gumbel, false, tokens, log_probs, py::none(), py::none(), lse, fault},
                        threads);
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
  m.def("draw", &draw);
  m.def("draw_candidates", &draw_candidates);
  m.def("verify_draft", &verify_draft);
}
