// A row's integer weights, and the thresholds of top-k and top-p, which are found by them. A block has a row, which it
// reads again and again from the cache: for its top, for the sums, and three times for each threshold, which is found
// by 11 bits of the score at a time with a histogram of what the ids weigh. No sum depends on its order.
#pragma once

#include "cuda_rows.cuh"

namespace pyquiet {

constexpr int kExactThreads = 1024, kExactWarps = kExactThreads / 32;
constexpr int kDigit = 11, kBins = 1 << kDigit, kGroup = kBins / kExactWarps;  // bins, and of them a warp's own

struct ExactShared {
  union {
    uint64_t weights[kBins];
    uint32_t counts[kBins];
  };
  uint64_t group[kExactWarps], best[kExactWarps], total[2][kExactWarps];
  uint64_t left;
  uint32_t key;

  PYQUIET_DEVICE uint64_t* bins(uint64_t) { return weights; }
  PYQUIET_DEVICE uint32_t* bins(uint32_t) { return counts; }
};

// Logits [size] and what makes them scores.
template <class E>
struct ScoreRow {
  const E* logits;
  int size;
  const Processing& law;
};

// use(score, id) for this thread's ids of a row.
template <class E, class Use>
PYQUIET_DEVICE void for_each_score(const ScoreRow<E>& row, float threshold, Use use) {
  constexpr int kVector = 16 / sizeof(E);
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row.logits) % 16 / sizeof(E));
  for (int i = static_cast<int>(threadIdx.x) * kVector - shift; i < row.size; i += kExactThreads * kVector) {
    E logits[kVector];
    const bool whole = i >= 0 && i + kVector <= row.size;
    if (whole) {
      const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(row.logits + i);
      memcpy(logits, &bytes, 16);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) logits[e] = row.logits[i + e < 0 || i + e >= row.size ? 0 : i + e];
    }
#pragma unroll
    for (int e = 0; e < kVector; ++e)
      if (whole || (i + e >= 0 && i + e < row.size)) use(row.law.score(logits[e], i + e, threshold), i + e);
  }
}

// The largest of a row's scores at which the sum of what is weighed, from the largest score on, exceeds `left`.
template <class W, class E, class Weigh>
PYQUIET_DEVICE float select(const ScoreRow<E>& row, W left, ExactShared& s, Weigh weigh) {
  W* bins = s.bins(W{});
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * kGroup;
  uint32_t found = 0;  // the leading bits of the key, which falls as the score rises
  for (int shift = 2 * kDigit; shift >= 0; shift -= kDigit) {
    for (int i = threadIdx.x; i < kBins; i += kExactThreads) bins[i] = 0;
    __syncthreads();
    for_each_score(row, kNegInf, [&](float score, int) {
      const uint32_t key = ~ordered(score);
      if (static_cast<uint64_t>(key) >> (shift + kDigit) != found) return;
      if (const W weight = weigh(score)) fetch_add(&bins[key >> shift & (kBins - 1)], weight);
    });
    __syncthreads();
    W sum = 0;
    for (int i = lane; i < kGroup; i += 32) sum += bins[own + i];
    sum = fold_warp(sum, Add{});
    if (lane == 0) s.group[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
      const int group = pick(kExactWarps, left, [&](int i) { return static_cast<W>(s.group[i]); }) * kGroup;
      const int bin = group + pick(kGroup, left, [&](int i) { return bins[group + i]; });
      if (lane == 0) s.key = found << kDigit | static_cast<uint32_t>(bin), s.left = left;
    }
    __syncthreads();
    found = s.key;
    left = static_cast<W>(s.left);
  }
  return unordered(~found);
}

// The largest sum of weights that does not reach top_p of the total.
PYQUIET_DEVICE uint64_t below(uint64_t total, double top_p) {
  uint64_t below = 0;
  for (uint64_t bit = uint64_t{1} << 63; bit; bit >>= 1)
    if (!reaches(below | bit, total, top_p)) below |= bit;
  return below;
}

template <class E>
PYQUIET_DEVICE uint64_t total_weight(const ScoreRow<E>& row, float top, float threshold, uint64_t* parts) {
  uint64_t sum = 0;
  for_each_score(row, threshold, [&](float score, int) { sum += fixed_weight(score - top); });
  return fold_block<kExactWarps>(sum, Add{}, parts);
}

// The row's largest ranked(score, id); a fault counts as +inf.
template <class E>
PYQUIET_DEVICE uint64_t best_of(const ScoreRow<E>& row, ExactShared& s) {
  uint64_t best = 0;
  for_each_score(row, kNegInf, [&](float score, int id) { best = Largest{}(best, ranked(fault_as_inf(score), id)); });
  return fold_block<kExactWarps>(best, Largest{}, s.best);
}

// The row's threshold as top-k and top-p say (law.hpp), given its largest score, which is finite.
template <class E>
PYQUIET_DEVICE float find_threshold(const ScoreRow<E>& row, float top, ExactShared& s) {
  float threshold = kNegInf;
  if (row.law.top_k > 0 && row.law.top_k < row.size)
    threshold = select<uint32_t>(row, static_cast<uint32_t>(row.law.top_k - 1), s, [](float) { return 1u; });
  if (row.law.top_p < 1) {
    const uint64_t total = total_weight(row, top, threshold, s.total[0]);
    // What is below the threshold of top-k comes after all that counts.
    threshold =
        select<uint64_t>(row, below(total, row.law.top_p), s, [&](float score) { return fixed_weight(score - top); });
  }
  return threshold;
}

}  // namespace pyquiet
