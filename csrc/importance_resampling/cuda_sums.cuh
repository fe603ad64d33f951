// What the kernels of the draws share, and the two that read whole rows: one finds a row's threshold, where it has any,
// the other sums up its weights, chunk by chunk.
#pragma once

#include <type_traits>

#include "../common/cuda_exact.cuh"
#include "contract.hpp"

namespace pyquiet {

constexpr int kSegment = 32 * kEach;  // ids: a warp's share of a chunk

// Of a row whose weights are integers or that has a threshold.
struct Known {
  float top, threshold;  // of the scores; top +inf: the row has a fault
};

// Of a chunk of a row. W, what weights are summed in: double, or uint64_t where they are integers.
template <class W>
struct alignas(16) ChunkSums {
  W total, segment[kWarps];  // of the weights of the scores: exp(score - the chunk's top), or those of law.hpp
  double base;               // of exp(logit - top)
  uint64_t best;             // the largest ranked(logit, id); at temperature 0 alone
  float top;                 // the largest logit; +inf: the row has a fault
};

template <class E>
struct RowDraws {
  const E* logits;
  int64_t stride;   // of rows
  Stream stream;    // index: of candidate 0
  Processing base;  // logits without the banned ids
  Processing law;   // what makes scores of those; at temperature 0 by 1, and `greedy`
  bool greedy;
  bool known;  // Known is made
  bool plain;  // scores are logits, and weigh the same
  int32_t V, chunks;
  int64_t rows, k;
  int64_t *tokens, *fault;
  float *log_probs, *log_base, *lse;               // the last two: none, or asked for
  int64_t token_stride, prob_stride, base_stride;  // of rows
  int64_t fault_stride, lse_stride;
  Known* knowns;  // [R]
  void* sums;     // [R, chunks] ChunkSums

  PYQUIET_DEVICE const E* row(int64_t r) const { return logits + r * stride; }
  PYQUIET_DEVICE float threshold(int64_t r) const { return known ? knowns[r].threshold : kNegInf; }
  PYQUIET_DEVICE float logit(E x, int id) const { return base.score(x, id, kNegInf); }
  PYQUIET_DEVICE float score(float logit, float threshold) const { return law.score(logit, 0, threshold); }
};

// What a score weighs, given the top that all are measured by.
PYQUIET_DEVICE float weight(float score, float top, double) {
  return exp_approximate(score - (top > kNegInf ? top : 0.0f));
}
PYQUIET_DEVICE uint64_t weight(float score, float top, uint64_t) { return fixed_weight(score - top); }
template <class W>
using Weight = decltype(weight(0.0f, 0.0f, W{}));

// The sum over a thread's elements, weigh(e): in W but for four at a time, whose sum is rounded as each of them is.
template <class W, class Weigh>
PYQUIET_DEVICE W sum_of_each(Weigh weigh) {
  W sum = 0;
#pragma unroll
  for (int e = 0; e < kEach; e += 4) sum += (weigh(e) + weigh(e + 1)) + (weigh(e + 2) + weigh(e + 3));
  return sum;
}

// Block: row.
template <class E>
__global__ void __launch_bounds__(kExactThreads, 1) threshold_kernel(const __grid_constant__ RowDraws<E> a) {
  auto& s = *reinterpret_cast<ExactShared*>(shared_memory());
  Processing law = a.law;
  law.banned = a.base.banned;
  const ScoreRow<E> scores{a.row(blockIdx.x), a.V, law};
  const float top = value_of(best_of(scores, s));
  float threshold = kNegInf;
  if (top > kNegInf && top < kInf) threshold = find_threshold(scores, top, s);
  if (threadIdx.x == 0) a.knowns[blockIdx.x] = {top, threshold};
}

template <class E, class W>
struct SumShared {
  alignas(16) char staged[kStagedBytes<E>];
  float top[kWarps];
  double base[kWarps];
  W sum[kWarps];
  uint64_t best[kWarps];
};

// Block: (row, chunk).
template <class E, class W>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ RowDraws<E> a) {
  auto& s = *reinterpret_cast<SumShared<E, W>*>(shared_memory());
  const auto chunks = static_cast<unsigned>(a.chunks);
  const int64_t r = blockIdx.x / chunks;
  const int first = static_cast<int>(blockIdx.x % chunks) * kChunk, count = chunk_size(first, a.V);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool greedy = std::is_same_v<W, double> && a.greedy;  // which never weighs in integers
  const E* staged = stage(a.row(r), first, count, s.staged);
  const float threshold = a.threshold(r);
  wait_copies();
  __syncthreads();
  float logit[kEach], top = kNegInf;
  uint64_t best = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = warp * kSegment + 2 * (lane + e / 2 * 32) + e % 2;
    logit[e] = i < count ? a.logit(staged[i], first + i) : kNegInf;
    top = fmaxf(top, fault_as_inf(logit[e]));
    if (greedy) best = Largest{}(best, ranked(logit[e], first + i));
  }
  top = fold_block<kWarps>(top, Largest{}, s.top);
  if (greedy) best = fold_block<kWarps>(best, Largest{}, s.best);
  const float score_top = std::is_same_v<W, double> ? a.score(top, kNegInf) : a.knowns[r].top;
  auto& sums = static_cast<ChunkSums<W>*>(a.sums)[blockIdx.x];
  const W sum =
      fold_warp(sum_of_each<W>([&](int e) { return weight(a.score(logit[e], threshold), score_top, W{}); }), Add{});
  if (lane == 0) sums.segment[warp] = s.sum[warp] = sum;
  double base = 0;
  if (!a.plain) {
    base = fold_warp(sum_of_each<double>([&](int e) { return weight(logit[e], top, double{}); }), Add{});
    if (lane == 0) s.base[warp] = base;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  W total = 0;
  base = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    total += s.sum[i];
    if (!a.plain) base += s.base[i];
  }
  sums.total = total;
  sums.base = a.plain ? static_cast<double>(total) : base;
  sums.best = best;
  sums.top = top;
}

}  // namespace pyquiet
