// The Python door of the CPU code: checks, unpacks, calls. Arrays come as addresses (int) that
// Python has checked for device, dtype and layout; address 0 means "none". The GIL is released
// around the work.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "common/isa.hpp"
#include "common/philox.hpp"

namespace py = pybind11;

namespace {

using namespace pyquiet;

// One word of the counter: an int64 a row, or one value for all rows.
struct Field {
  const char* name;
  const int64_t* rows;
  int64_t value;
  int64_t limit;  // values lie in [0, limit)

  Field(const char* name, uintptr_t address, int64_t value, int64_t limit)
      : name(name), rows(reinterpret_cast<const int64_t*>(address)), value(value), limit(limit) {}

  uint32_t at(int64_t row) const {
    const int64_t x = rows ? rows[row] : value;
    if (x < 0 || x >= limit) {
      throw std::invalid_argument("stream." + std::string(name) + " must be in [0, " +
                                  std::to_string(limit) + "), got " + std::to_string(x) +
                                  " at row " + std::to_string(row));
    }
    return static_cast<uint32_t>(x);
  }
};

constexpr int64_t kWord = int64_t{1} << 32, kIndices = int64_t{1} << 26;

// out: double [rows]. Each field is (address of int64 [rows] or 0, the value where it is 0); a
// sequence of (0, -1) counts the rows.
void uniforms(uintptr_t out, int64_t rows, uint64_t seed, uintptr_t sequence_rows, int64_t sequence,
              uintptr_t position_rows, int64_t position, uintptr_t step_rows, int64_t step,
              uint32_t purpose, uintptr_t index_rows, int64_t index) {
  py::gil_scoped_release release;
  const Field sequences("sequence", sequence_rows, sequence, kWord);
  const Field positions("position", position_rows, position, kWord);
  const Field steps("step", step_rows, step, kWord);
  const Field indices("index", index_rows, index, kIndices);
  const bool count_rows = !sequence_rows && sequence == -1;
  double* u = reinterpret_cast<double*>(out);
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t id = count_rows ? static_cast<uint32_t>(r) : sequences.at(r);
    u[r] = uniform(philox(seed, {id, positions.at(r), steps.at(r), purpose << 26 | indices.at(r)}));
  }
}

std::array<uint32_t, 4> philox_words(uint64_t seed, const std::array<uint32_t, 4>& counter) {
  const PhiloxBlock block = philox(seed, {counter[0], counter[1], counter[2], counter[3]});
  return {block.word[0], block.word[1], block.word[2], block.word[3]};
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

  m.doc() =
      "CPU kernels of pyquiet. Import it through pyquiet.native, which loads torch's OpenMP first.";
  m.def("isa", [] { return isa_name(isa()); });
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("openmp_threads", &openmp_threads, "Threads of the OpenMP runtime, 0 without OpenMP.");
  m.def("philox", &philox_words, py::arg("seed"), py::arg("counter"));
  m.def("uniforms", &uniforms);
}
