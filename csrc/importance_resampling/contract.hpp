// Candidates for importance resampling (arXiv 2410.21357): k exact draws a row from one reading of its logits.
//
// With q the law of a row (common/law.hpp) and mu = softmax(logits) without the banned ids (no temperature, top-k or
// top-p), candidate j of row r is
//   y_j = the first id in vocabulary order whose cumulative weight exceeds u_j times the total, u_j the uniform of row
//         r of the stream at index + j
// in double across chunks and inside of them (float sums would lose a tail of mass 2^-24), or, where `deterministic`,
// with the integer weights of q and cdf_threshold(u_j, W). At temperature 0, y_j = argmax_v score(v), lowest id of
// equal ones. One candidate with `gumbel` instead takes argmax_v score(v) + gumbel_noise(v), as draft verification
// does.
//
// log_probs = log q(y_j), 0 at temperature 0; log_base = log mu(y_j); lse: the log-sum-exp of mu's logits; law_lse:
// that of q's scores, 0 at temperature 0. fault[r]: 1 where a score is NaN or +inf or no id is left, -1 on CUDA where
// an address of the row's numbers is out of range, else 0; the row's other results are then of no meaning.
#pragma once

#include "../common/law.hpp"
#include "../common/view.hpp"

namespace pyquiet {

template <class E>
struct CandidateDraw {
  View<const E, 2> logits;  // [R, V]  last dimension contiguous
  Stream stream;            // rows r, with the caller's purpose; index + k at most 2^26
  Processing processing;    // of q
  bool gumbel, deterministic;
  View<int64_t, 2> tokens;   // [R, k]
  View<float, 2> log_probs;  // [R, k]
  View<float, 2> log_base;   // [R, k]  none, with `lse`: not asked for
  View<float, 1> lse;        // [R]
  View<float, 1> law_lse;    // [R]     none: not asked for
  View<int64_t, 1> fault;    // [R]
};

}  // namespace pyquiet
