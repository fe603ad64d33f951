// The kernel that reduces a row in integers: its threshold, and the sum of its weights.
#pragma once

#include "../common/cuda_exact.cuh"
#include "cuda_rows.cuh"

namespace pyquiet {

// Block: row.
template <class E>
__global__ void __launch_bounds__(kExactThreads, 1) exact_kernel(const __grid_constant__ Verify<E> a) {
  auto& s = *reinterpret_cast<ExactShared*>(shared_memory());
  const Row<E> row(a, blockIdx.x);
  if (threadIdx.x == 0) a.arrived[row.b] = 0;
  if (!row.wanted) return;
  const ScoreRow<E> scores{row.logits, a.V, a.processing[row.of_draft]};
  const uint64_t best = best_of(scores, s);
  const float top = value_of(best);
  float threshold = kNegInf;
  uint64_t total = 0;
  if (top > kNegInf && top < kInf && !a.greedy[row.of_draft]) {
    threshold = find_threshold(scores, top, s);
    if (!a.partial) total = total_weight(scores, top, threshold, s.total[1]);
  }
  if (threadIdx.x == 0) a.exacts[row.slot] = {total, best, top, threshold};
}

}  // namespace pyquiet
