// Unpacks the tensors of draft verification and of draws and checks them against the contract; the same for every
// device.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/tensor.hpp"
#include "contract.hpp"

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

// `offsets`: how far positions are counted on.
inline void check_stream(const Stream& stream, int64_t rows, int64_t offsets) {
  constexpr int64_t kWords = int64_t{1} << 32, kIndices = int64_t{1} << 26;
  check_field("sequence", stream.sequence, rows, kWords);
  check_field("position", stream.position, rows, kWords - offsets);
  check_field("step", stream.step, rows, kWords);
  check_field("index", stream.index, rows, kIndices);
}

inline bool read_stream(const StreamArguments& from, int64_t rows, int64_t offsets, Device device, Stream& stream) {
  stream.seed = from.seed;
  stream.purpose = from.purpose;
  CounterField* const fields[] = {&stream.sequence, &stream.position, &stream.step, &stream.index};
  for (int i = 0; i < 4; ++i) {
    View<const int64_t, 1> view;
    if (!from.tensors[i].is_none() && !(read_tensor(from.tensors[i], view, device) && has_shape(view, {rows})))
      return false;
    *fields[i] = {view.data, from.words[i]};
  }
  if (device == Device::cpu && rows > 0) check_stream(stream, rows, offsets);
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

// Tensors in the order of the op (pyquiet/kernels/draft_verification.py), unread.
struct VerificationArguments {
  pybind11::handle target, draft, draft_tokens, draft_lse, lengths;
  StreamArguments stream;
  ProcessingArguments processing;
  double draft_temperature;
  bool first_is_exact, gumbel, deterministic;
  std::array<pybind11::handle, 6> results;  // tokens, count, accepted, log_probs, bonus, fault
};

template <class T, int N>
bool read_optional(pybind11::handle tensor, View<T, N>& view, Device device, const std::array<int64_t, N>& shape) {
  return tensor.is_none() || (read_tensor(tensor, view, device) && has_shape<T, N>(view, shape));
}

template <class E>
bool read_drafts(const VerificationArguments& from, Device device, DraftVerification<E>& a) {
  if (!read_tensor(from.target, a.target, device) || !read_tensor(from.draft_tokens, a.draft_tokens, device))
    return false;
  const auto [B, rows, V] = a.target.shape;
  const int64_t k = a.draft_tokens.shape[1];
  if (a.draft_tokens.shape[0] != B || (rows != k && rows != k + 1)) return false;
  if (!has_shape(a.target, {B, rows, V}) || !read_optional<const E, 3>(from.draft, a.draft, device, {B, k, V}) ||
      !read_optional<const float, 2>(from.draft_lse, a.draft_lse, device, {B, k}) ||
      !read_optional<const int64_t, 1>(from.lengths, a.lengths, device, {B}))
    return false;
  const bool needed = !from.gumbel && from.processing.temperature != 0 && k > from.first_is_exact;
  if (from.draft.is_none() && needed) return false;
  if (device != Device::cpu) return true;  // the values stand on the device; the kernels there guard themselves
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = a.lengths ? *a.lengths.at(b) : k;
    if (length < 0 || length > k) return false;
    for (int64_t j = 0; j < length; ++j)
      if (*a.draft_tokens.at(b, j) < 0 || *a.draft_tokens.at(b, j) >= V) return false;
  }
  return true;
}

// Both return false, with nothing written, where an argument breaks the contract; Python then says which and how.
template <class E>
bool read_verification(const VerificationArguments& from, Device device, DraftVerification<E>& a) {
  if (!read_drafts(from, device, a)) return false;
  const int64_t B = a.target.shape[0], k = a.draft_tokens.shape[1], t = a.target.shape[2];
  Processing draft;
  ProcessingArguments of_draft = from.processing;
  of_draft.temperature = from.draft_temperature;
  if (!read_processing(from.processing, t, device, a.processing) || !read_processing(of_draft, t, device, draft) ||
      !read_stream(from.stream, B, k, device, a.stream))
    return false;
  a.draft_inverse = draft.inverse;
  a.first_is_exact = from.first_is_exact;
  a.gumbel = from.gumbel;
  a.deterministic = from.deterministic;
  return read_tensor(from.results[0], a.tokens, device) && read_tensor(from.results[1], a.count, device) &&
         read_tensor(from.results[2], a.accepted, device) && read_tensor(from.results[3], a.log_probs, device) &&
         read_tensor(from.results[4], a.bonus, device) && read_tensor(from.results[5], a.fault, device) &&
         has_shape(a.tokens, {B, k + 1}) && has_shape(a.count, {B}) && has_shape(a.accepted, {B}) &&
         has_shape(a.log_probs, {B, k + 1}) && has_shape(a.bonus, {B}) && has_shape(a.fault, {B});
}

// results: tokens, log_probs, lse, fault
template <class E>
bool read_draw(pybind11::handle logits, const StreamArguments& stream, const ProcessingArguments& processing,
               const std::array<pybind11::handle, 4>& results, Device device, RowDraw<E>& a) {
  if (!read_tensor(logits, a.logits, device)) return false;
  const auto [R, V] = a.logits.shape;
  return has_shape(a.logits, {R, V}) && read_processing(processing, V, device, a.processing) &&
         read_stream(stream, R, 0, device, a.stream) && read_tensor(results[0], a.tokens, device) &&
         read_tensor(results[1], a.log_probs, device) && read_tensor(results[2], a.lse, device) &&
         read_tensor(results[3], a.fault, device) && has_shape(a.tokens, {R}) && has_shape(a.log_probs, {R}) &&
         has_shape(a.lse, {R}) && has_shape(a.fault, {R});
}

// How many sequences or rows have a fault.
inline int faults(const View<int64_t, 1>& fault) {
  int count = 0;
  for (int64_t r = 0; r < fault.shape[0]; ++r) count += *fault.at(r) != 0;
  return count;
}

}  // namespace pyquiet
