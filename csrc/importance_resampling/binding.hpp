// Unpacks the tensors of draws and checks them against the contract; the same for every device.
#pragma once

#include "../common/arguments.hpp"
#include "contract.hpp"

namespace pyquiet {

// Tensors unread; log_base and lse None where they are not asked for, as law_lse.
struct CandidateArguments {
  pybind11::handle logits;
  StreamArguments stream;
  ProcessingArguments processing;
  int64_t k;
  bool gumbel, deterministic;
  pybind11::handle tokens, log_probs, log_base, lse, law_lse, fault;
};

// False, with nothing written, where an argument breaks the contract; Python then says which and how.
template <class E>
bool read_candidates(const CandidateArguments& from, Device device, CandidateDraw<E>& a) {
  if (!read_tensor(from.logits, a.logits, device)) return false;
  const auto [R, V] = a.logits.shape;
  const int64_t k = from.k;
  a.gumbel = from.gumbel;
  a.deterministic = from.deterministic;
  return k >= 1 && (k == 1 || !a.gumbel) && has_shape(a.logits, {R, V}) &&
         read_processing(from.processing, V, device, a.processing) &&
         read_stream(from.stream, R, 0, k - 1, device, a.stream) && read_tensor(from.tokens, a.tokens, device) &&
         read_tensor(from.log_probs, a.log_probs, device) && read_tensor(from.fault, a.fault, device) &&
         has_shape(a.tokens, {R, k}) && has_shape(a.log_probs, {R, k}) && has_shape(a.fault, {R}) &&
         read_optional<float, 2>(from.log_base, a.log_base, device, {R, k}) &&
         read_optional<float, 1>(from.lse, a.lse, device, {R}) &&
         read_optional<float, 1>(from.law_lse, a.law_lse, device, {R}) && from.log_base.is_none() == from.lse.is_none();
}

}  // namespace pyquiet
