// The kernel that looks candidates up in the sums of their rows: by a chunk's, a segment's, a lane's, an id's.
#pragma once

#include "cuda_sums.cuh"

namespace pyquiet {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// What is known of a row once its chunks are put together; the same in every lane.
template <class W>
struct RowLaw {
  const ChunkSums<W>* chunks;
  float top, score_top, threshold;  // top: the largest logit
  double base;                      // of exp(logit - top)
  W total;                          // of the weights of all scores, by score_top
  int best;

  PYQUIET_DEVICE bool valid() const { return top > kNegInf && score_top > kNegInf && score_top < kInf; }
  PYQUIET_DEVICE double lse() const { return top + log(base); }
  PYQUIET_DEVICE double law_lse() const {
    return score_top + log(static_cast<double>(total) * (std::is_same_v<W, double> ? 1.0 : 0x1p-40));
  }
};

// What chunk i's sums count for in the row's.
template <class E>
PYQUIET_DEVICE double factor(const RowDraws<E>& a, const RowLaw<double>& law, int i) {
  return exp_approximate(a.score(law.chunks[i].top, kNegInf) - law.score_top);
}
template <class E>
PYQUIET_DEVICE uint64_t factor(const RowDraws<E>&, const RowLaw<uint64_t>&, int) {
  return 1;
}

// By a warp.
template <class W, class E>
PYQUIET_DEVICE RowLaw<W> law_of(const RowDraws<E>& a, int64_t r) {
  const int lane = threadIdx.x % 32;
  RowLaw<W> law{static_cast<const ChunkSums<W>*>(a.sums) + r * a.chunks, kNegInf, 0.0f, a.threshold(r), 0.0, 0, 0};
  uint64_t best = 0;
  for (int i = lane; i < a.chunks; i += 32) {
    law.top = fmaxf(law.top, law.chunks[i].top);
    best = Largest{}(best, law.chunks[i].best);
  }
  law.top = fold_warp(law.top, Largest{});
  law.best = id_of(fold_warp(best, Largest{}));
  law.score_top = a.score(law.top, kNegInf);
  if (!law.valid()) return law;
  for (int i = lane; i < a.chunks; i += 32) {
    const ChunkSums<W>& chunk = law.chunks[i];
    law.base += chunk.base * exp_approximate(chunk.top - law.top);
    law.total += chunk.total * factor(a, law, i);
  }
  law.base = fold_warp(law.base, Add{});
  law.total = fold_warp(law.total, Add{});
  return law;
}

// Where a sum of floats was rounded otherwise than the one that is searched, `left` means its share of it.
PYQUIET_DEVICE double rescaled(double left, double sum, double searched) { return left * (searched / sum); }
PYQUIET_DEVICE uint64_t rescaled(uint64_t left, uint64_t, uint64_t) { return left; }

// By a warp, whose lanes have kEach ids each, in their order: the id at which the cumulative weight exceeds `left`, in
// a segment of the row whose weights sum up to `sum`.
template <class W, class E>
PYQUIET_DEVICE int find(const RowDraws<E>& a, const E* row, int first, float top, float threshold, W sum, W left) {
  const int own = first + static_cast<int>(threadIdx.x) % 32 * kEach;
  Weight<W> weights[kEach];
  W mine = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    weights[e] = own + e < a.V ? weight(a.score(a.logit(row[own + e], own + e), threshold), top, W{}) : 0;
    mine += weights[e];
  }
  left = rescaled(left, sum, fold_warp(mine, Add{}));
  const int lane = pick(32, left, [&](int) { return mine; });
  int found = 0;
  W before = 0;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    if (weights[e] > 0 && before <= left) found = e;
    before += weights[e];
  }
  return __shfl_sync(kAll, own + found, lane);
}

PYQUIET_DEVICE double cdf_limit(double u, double total) { return u * total; }
PYQUIET_DEVICE uint64_t cdf_limit(double u, uint64_t total) { return cdf_threshold(u, total); }

// By a warp: the row's inverse CDF at u.
template <class W, class E>
PYQUIET_DEVICE int invert(const RowDraws<E>& a, int64_t r, const RowLaw<W>& law, double u) {
  W left = cdf_limit(u, law.total);
  const int c = pick(a.chunks, left, [&](int i) { return law.chunks[i].total * factor(a, law, i); });
  left /= factor(a, law, c);
  const ChunkSums<W>& chunk = law.chunks[c];
  const int segment = pick(kWarps, left, [&](int i) { return chunk.segment[i]; });
  const float top = std::is_same_v<W, double> ? a.score(chunk.top, kNegInf) : law.score_top;
  return find(a, a.row(r), c * kChunk + segment * kSegment, top, law.threshold, chunk.segment[segment], left);
}

// Whether all addresses of a row's k numbers exist.
PYQUIET_DEVICE bool in_range(const Stream& stream, int64_t r, int64_t k) {
  const auto below = [r](const CounterField& field, int64_t limit) { return field.at(r) >= 0 && field.at(r) < limit; };
  constexpr int64_t kWords = int64_t{1} << 32, kIndices = int64_t{1} << 26;
  return below(stream.sequence, kWords) && below(stream.position, kWords) && below(stream.step, kWords) &&
         below(stream.index, kIndices + 1 - k);
}

// Warp: (row, candidate).
template <class E, class W>
__global__ void __launch_bounds__(kThreads) lookup_kernel(const __grid_constant__ RowDraws<E> a) {
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, r = warp / a.k, j = warp % a.k;
  if (r >= a.rows) return;
  const RowLaw<W> law = law_of<W>(a, r);
  const int64_t fault = !in_range(a.stream, r, a.k) ? -1 : !law.valid();
  int id = law.best;
  if (!a.greedy && !fault) {
    PhiloxBlock counter = a.stream.counter(r);
    counter.word[3] += static_cast<uint32_t>(j);
    id = invert(a, r, law, uniform(philox(a.stream.seed, counter)));
  }
  if (threadIdx.x % 32 != 0) return;
  const float logit = fault ? kNaN : a.logit(a.row(r)[id], id);
  a.tokens[r * a.token_stride + j] = fault ? -1 : id;
  const double log_prob = a.greedy ? 0.0 : a.score(logit, kNegInf) - law.law_lse();
  a.log_probs[r * a.prob_stride + j] = fault ? kNaN : static_cast<float>(log_prob);
  if (a.log_base) a.log_base[r * a.base_stride + j] = static_cast<float>(logit - law.lse());
  if (j != 0) return;
  if (a.lse) a.lse[r * a.lse_stride] = fault ? kNaN : static_cast<float>(law.lse());
  a.fault[r * a.fault_stride] = fault;
}

}  // namespace pyquiet
