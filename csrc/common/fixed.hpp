// Integer weights of a row on the CPU (law.hpp), and the thresholds of top-k and top-p, which are found by them.
#pragma once

#include <functional>
#include <numeric>

#include "rows.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

// The weights of a block's scores.
struct BlockWeights {
  alignas(64) int32_t high[kBlock], low[kBlock];

  void of(const F (&x)[4], float top) {
    for (int u = 0; u < 4; ++u) {
      const FixedWeight<I> w = fixed_weight<Vector>(x[u] - top);
      std::memcpy(high + u * kLanes, &w.high, sizeof(I));
      std::memcpy(low + u * kLanes, &w.low, sizeof(I));
    }
  }

  uint64_t at(int i) const { return (static_cast<uint64_t>(high[i]) << 20) + static_cast<uint64_t>(low[i]); }
};

// run(c, the sums of the weights of chunk c's parts) for each chunk.
template <class E, class Run>
inline void each_fixed_chunk(const Row<E>& row, float top, int threads, Run run) {
  in_parallel(row.chunks(), threads, [&](int64_t c) {
    uint64_t parts[kParts] = {};
    for (int64_t v = c * kChunk; v < row.end(c);) {
      I high{}, low{};  // at most 2^20 * kPart / kLanes a lane
      uint64_t& sum = parts[v % kChunk / kPart];
      for (const int64_t end = std::min<int64_t>(v + kPart, row.end(c)); v < end; v += kBlock) {
        F x[4];
        row.block(v, x);
        for (int u = 0; u < 4; ++u) {
          const FixedWeight<I> w = fixed_weight<Vector>(x[u] - top);
          high += w.high;
          low += w.low;
        }
      }
      for (int i = 0; i < kLanes; ++i) sum += (static_cast<uint64_t>(high[i]) << 20) + static_cast<uint64_t>(low[i]);
    }
    run(c, parts);
  });
}

template <class E>
inline uint64_t fixed_total(const Row<E>& row, float top, int threads) {
  std::vector<uint64_t> sums(row.chunks());
  each_fixed_chunk(row, top, threads, [&](int64_t c, const uint64_t* parts) {
    sums[c] = std::accumulate(parts, parts + kParts, uint64_t{0});
  });
  return std::accumulate(sums.begin(), sums.end(), uint64_t{0});
}

// As FloatWeights, of integers.
template <class E>
struct FixedWeights {
  using Weight = uint64_t;
  using Sum = uint64_t;
  const Row<E>& row;
  float top;
  std::vector<Sum> sums;

  FixedWeights(const Row<E>& of, float largest, int threads) : row(of), top(largest), sums(of.chunks() * kParts) {
    each_fixed_chunk(row, top, threads,
                     [&](int64_t c, const Sum* parts) { std::copy(parts, parts + kParts, sums.data() + c * kParts); });
    std::partial_sum(sums.begin(), sums.end(), sums.begin());
  }

  const std::vector<Sum>& cdf() const { return sums; }
  Sum threshold(double u) const { return cdf_threshold(u, sums.back()); }

  Sum block(int64_t v, Weight* weights) const {
    BlockWeights fixed;
    F x[4];
    row.block(v, x);
    fixed.of(x, top);
    for (int i = 0; i < kBlock; ++i) weights[i] = fixed.at(i);
    return std::accumulate(weights, weights + kBlock, Sum{0});
  }
};

struct Candidate {
  uint32_t key;  // the bits of the score, in the order of floats
  uint64_t weight;
};

// The scores from `least` on, with their weights; without `top`, each weighs 1.
template <class E>
inline std::vector<Candidate> candidates(const Row<E>& row, float least, const float* top) {
  std::vector<Candidate> found;
  BlockWeights weights;
  alignas(64) float scores[kBlock];
  for (int64_t v = 0; v < row.size; v += kBlock) {
    F x[4];
    row.block(v, x);
    if (!any_above(max(max(x[0], x[1]), max(x[2], x[3])), std::nextafter(least, kNegInf))) continue;
    for (int u = 0; u < 4; ++u) store(scores + u * kLanes, x[u]);
    if (top) weights.of(x, *top);
    for (int i = 0; i < kBlock; ++i) {
      const auto bits = bit_cast<uint32_t>(scores[i]);
      if (scores[i] >= least) found.push_back({bits >> 31 ? ~bits : bits | 0x80000000, top ? weights.at(i) : 1});
    }
  }
  return found;
}

// The largest score s for which `reached` holds of the weight of all scores >= s: by a histogram over the bits of
// their keys, from the highest bits to the lowest.
template <class Reached>
inline float select(const std::vector<Candidate>& from, Reached reached) {
  uint64_t above = 0, prefix = 0;
  int shift = 32;
  for (const int bits : {11, 11, 10}) {
    shift -= bits;
    std::vector<uint64_t> histogram(size_t{1} << bits);
    for (const auto& [key, weight] : from)
      if (uint64_t{key} >> (shift + bits) == prefix) histogram[key >> shift & (histogram.size() - 1)] += weight;
    size_t bin = histogram.size() - 1;
    for (; bin > 0 && !reached(above + histogram[bin]); --bin) above += histogram[bin];
    prefix = prefix << bits | bin;
  }
  const auto key = static_cast<uint32_t>(prefix);
  return bit_cast<float>(key >> 31 ? key ^ 0x80000000 : ~key);
}

// The n-th largest of the blocks' largest scores: at least n scores are as large.
template <class E>
inline float nth_of_blocks(const Row<E>& row, int64_t n) {
  std::vector<float> largest;
  for (int64_t v = 0; v < row.size; v += kBlock) {
    F x[4];
    row.block(v, x);
    largest.push_back(largest_lane(max(max(x[0], x[1]), max(x[2], x[3]))));
  }
  if (n > static_cast<int64_t>(largest.size())) return kNegInf;
  std::nth_element(largest.begin(), largest.begin() + (n - 1), largest.end(), std::greater<float>());
  return largest[n - 1];
}

// Raises the row's threshold as top-k and top-p say. top: its largest score.
template <class E>
inline void keep_largest(Row<E>& row, float top) {
  const Processing& p = row.processing;
  if (p.top_k > 0 && p.top_k < row.size)
    row.threshold = select(candidates(row, nth_of_blocks(row, p.top_k), nullptr),
                           [&](uint64_t n) { return n >= static_cast<uint64_t>(p.top_k); });
  if (p.top_p < 1) {
    const uint64_t total = fixed_total(row, top, 1);
    // All scores below that weigh less than 1 - top_p together. (The last factor leaves room for roundings.)
    const double least = std::log((1 - p.top_p) * static_cast<double>(total) * 0x1p-40 / row.size * 0.99);
    row.threshold = std::max(row.threshold, select(candidates(row, top + static_cast<float>(least), &top),
                                                   [&](uint64_t w) { return reaches(w, total, p.top_p); }));
  }
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
