// Unpacks the tensors of draft verification and checks them against the contract; the same for every device.
#pragma once

#include "../common/arguments.hpp"
#include "contract.hpp"

namespace pyquiet {

// Tensors in the order of the op (pyquiet/kernels/draft_verification.py), unread.
struct VerificationArguments {
  pybind11::handle target, draft, draft_tokens, draft_lse, lengths;
  StreamArguments stream;
  ProcessingArguments processing;
  double draft_temperature;
  bool first_is_exact, gumbel, deterministic;
  std::array<pybind11::handle, 6> results;  // tokens, count, accepted, log_probs, bonus, fault
};

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
      !read_stream(from.stream, B, k, 0, device, a.stream))
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

}  // namespace pyquiet
