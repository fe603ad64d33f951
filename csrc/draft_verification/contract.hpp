// Parallel joint-density verification of drafts (arXiv 2504.20456; 2211.17192): what every implementation computes.
//
// Sequence b has L = lengths[b] drafts d_0 .. d_{L-1} (none: L = k). With q_j the law of target row j and p_j that of
// draft row j (common/law.hpp), rows are taken in order, j = 0 .. L-1:
//   accept d_j      if u_j p_j(d_j) < q_j(d_j), u_j the uniform at position + j, purpose ACCEPT; d_0 always with
//                   first_is_exact
//   else            y ~ max(q_j - p_j, 0) / mass, by the uniform at position + j, purpose RESIDUAL: the first id in
//                   vocabulary order whose cumulative weight exceeds u * mass; from q_j where the mass is at most
//                   kNoResidual. The sequence ends here; later rows are not looked at
// and where all L are accepted and there is a row k, y ~ q_L by the uniform at position + L, purpose BONUS.
// `gumbel` instead takes y_j = argmax_v score(v) + gumbel_noise(position + j, v) (lowest id of equal ones): d_j is
// accepted if it is y_j, else y_j replaces it, and the bonus is y_L. At temperature 0, y_j = argmax_v score(v).
//
// draft_lse, the log-sum-exp of the processed draft rows, stands for reading them where d_j is tested; the id d_j then
// counts as kept by top-k and top-p. `deterministic` does not use it, and has integers for weights: with W the sum of a
// row's weights, q = fixed_probability(weight, probability_unit(W)), so has p; accepts_fixed, then weights max(q - p,
// 0) and cdf_threshold. (q_L: the weights themselves.) A greedy draft law has p = 2^62 at one id.
//
// tokens: the accepted drafts, then y, then -1. count: how many. accepted: drafts kept. log_probs: of the tokens under
// q_j, 0 at temperature 0 and at padding. fault[b]: 0, or 1 + 2 j + (0 target, 1 draft) for the first row met that
// holds NaN or +inf in a score or has no id left, -1 on CUDA where lengths[b] or a draft is out of range; the
// sequence's other results are then of no meaning.
#pragma once

#include "../common/law.hpp"
#include "../common/view.hpp"

namespace pyquiet {

template <class E>
struct DraftVerification {
  View<const E, 3> target;              // [B, k or k + 1, V]  last dimension contiguous, as in `draft`
  View<const E, 3> draft;               // [B, k, V]           none: not needed
  View<const int64_t, 2> draft_tokens;  // [B, k]              in 0 .. V-1 below lengths[b]
  View<const float, 2> draft_lse;       // [B, k]              none: computed
  View<const int64_t, 1> lengths;       // [B]                 in 0 .. k; none: k
  Stream stream;                        // rows b; its purpose is not used
  Processing processing;                // of the target
  float draft_inverse;                  // that of the draft; the rest is the same
  bool first_is_exact, gumbel, deterministic;
  View<int64_t, 2> tokens;    // [B, k + 1]
  View<int64_t, 1> count;     // [B]
  View<int64_t, 1> accepted;  // [B]
  View<float, 2> log_probs;   // [B, k + 1]
  View<bool, 1> bonus;        // [B]
  View<int64_t, 1> fault;     // [B]
};

}  // namespace pyquiet
