// Arguments that kernels share, the Stream and what makes a law of logits: read and checked, the same for every device.
// Only the bindings include this.
#pragma once

#include <stdexcept>
#include <string>

#include "law.hpp"
#include "tensor.hpp"

namespace pyquiet {

// A Stream's fields in the order of the counter: a tensor, or a number where that is None.
struct StreamArguments {
  std::array<pybind11::handle, 4> tensors;
  std::array<int64_t, 4> words;
  uint64_t seed;
  uint32_t purpose;
};

struct ProcessingArguments {
  pybind11::handle banned;
  double temperature;
  pybind11::handle top_k, top_p;
};

// The values of a field in host memory.
inline void check_field(const char* name, const CounterField& field, int64_t rows, int64_t limit) {
  for (int64_t r = 0; r < (field.rows ? rows : 1); ++r) {
    const int64_t x = field.at(r);
    if (x >= 0 && x < limit) continue;
    throw std::invalid_argument("stream." + std::string(name) + " must be in [0, " + std::to_string(limit) + "), got " +
                                std::to_string(x) + " at row " + std::to_string(r));
  }
}

// `offsets` and `indices`: how far positions and indices are counted on.
inline void check_stream(const Stream& stream, int64_t rows, int64_t offsets, int64_t indices) {
  constexpr int64_t kWords = int64_t{1} << 32, kIndices = int64_t{1} << 26;
  check_field("sequence", stream.sequence, rows, kWords);
  check_field("position", stream.position, rows, kWords - offsets);
  check_field("step", stream.step, rows, kWords);
  check_field("index", stream.index, rows, kIndices - indices);
}

inline bool read_stream(const StreamArguments& from, int64_t rows, int64_t offsets, int64_t indices, Device device,
                        Stream& stream) {
  stream.seed = from.seed;
  stream.purpose = from.purpose;
  CounterField* const fields[] = {&stream.sequence, &stream.position, &stream.step, &stream.index};
  for (int i = 0; i < 4; ++i) {
    View<const int64_t, 1> view;
    if (!from.tensors[i].is_none() && !(read_tensor(from.tensors[i], view, device) && has_shape(view, {rows})))
      return false;
    *fields[i] = {view.data, from.words[i]};
  }
  if (device == Device::cpu && rows > 0) check_stream(stream, rows, offsets, indices);
  return true;
}

inline float inverse_temperature(double temperature) {
  return temperature == 0 ? 0.0f : static_cast<float>(1 / temperature);
}

inline bool read_processing(const ProcessingArguments& from, int64_t ids, Device device, Processing& p) {
  View<const bool, 1> banned;
  if (!from.banned.is_none() && !(read_tensor(from.banned, banned, device) && has_shape(banned, {ids}))) return false;
  const auto fits = [](double t) { return t == 0 || (t >= 1e-37 && t <= 1e37); };
  p = {banned.data, inverse_temperature(from.temperature), 0, 1.0};
  if (!from.top_k.is_none()) {
    int overflow = 0;
    p.top_k = PyLong_AsLongLongAndOverflow(from.top_k.ptr(), &overflow);
    if (p.top_k == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    if (overflow > 0) p.top_k = ids;
    if (p.top_k < 1) return false;
  }
  if (!from.top_p.is_none()) p.top_p = from.top_p.cast<double>();
  return fits(from.temperature) && p.top_p > 0 && p.top_p <= 1 && ids >= 1 && ids <= 1 << 24;
}

template <class T, int N>
bool read_optional(pybind11::handle tensor, View<T, N>& view, Device device, const std::array<int64_t, N>& shape) {
  return tensor.is_none() || (read_tensor(tensor, view, device) && has_shape<T, N>(view, shape));
}

// How many sequences or rows have a fault.
inline int faults(const View<int64_t, 1>& fault) {
  int count = 0;
  for (int64_t r = 0; r < fault.shape[0]; ++r) count += *fault.at(r) != 0;
  return count;
}

}  // namespace pyquiet
