// Integer weights of a row on the CPU (law.hpp), and the thresholds of top-k and top-p, which are found by them.
#pragma once

#include "rows.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

// The weights of a chunk's scores. Padding weighs 0.
struct ChunkWeights {
  alignas(64) int32_t high[kChunk], low[kChunk];

  // Returns their sum.
  uint64_t read(const Buffer& chunk, int n, float top) {
    I sum_high{}, sum_low{};  // at most 2^20 * kChunk / kLanes a lane
    for (int i = 0; i < n; i += kLanes) {
      const FixedWeight<I> w = fixed_weight<Vector>(load(chunk.score + i) - top);
      std::memcpy(high + i, &w.high, sizeof(I));
      std::memcpy(low + i, &w.low, sizeof(I));
      sum_high += w.high;
      sum_low += w.low;
    }
    uint64_t sum = 0;
    for (int i = 0; i < kLanes; ++i)
      sum += (static_cast<uint64_t>(sum_high[i]) << 20) + static_cast<uint64_t>(sum_low[i]);
    return sum;
  }

  uint64_t at(int i) const { return (static_cast<uint64_t>(high[i]) << 20) + static_cast<uint64_t>(low[i]); }
};

template <class E>
inline uint64_t fixed_total(const Row<E>& row, float top, int threads) {
  std::vector<uint64_t> sums(row.chunks());
  in_parallel(row.chunks(), threads, [&](int64_t c) {
    Buffer chunk;
    ChunkWeights weights;
    row.read(c, chunk);
    sums[c] = weights.read(chunk, row.padded(c), top);
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

// The largest score s for which `reached` holds of the weight of all scores >= s. A histogram over the bits of floats,
// in their order, from the highest bits to the lowest: three readings of the row. top: none counts the scores.
template <class E, class Reached>
inline float select(const Row<E>& row, const float* top, Reached reached) {
  uint64_t above = 0, prefix = 0;
  int shift = 32;
  for (const int bits : {11, 11, 10}) {
    shift -= bits;
    std::vector<uint64_t> histogram(size_t{1} << bits);
    for (int64_t c = 0; c < row.chunks(); ++c) {
      Buffer chunk;
      ChunkWeights weights;
      row.read(c, chunk);
      if (top) weights.read(chunk, row.padded(c), *top);
      for (int i = 0; i < row.length(c); ++i) {
        const auto x = bit_cast<uint32_t>(chunk.score[i]);
        const uint64_t key = x >> 31 ? ~x : x | 0x80000000;
        if (key >> (shift + bits) == prefix)
          histogram[key >> shift & (histogram.size() - 1)] += top ? weights.at(i) : 1;
      }
    }
    size_t bin = histogram.size() - 1;
    for (; bin > 0 && !reached(above + histogram[bin]); --bin) above += histogram[bin];
    prefix = prefix << bits | bin;
  }
  const auto key = static_cast<uint32_t>(prefix);
  return bit_cast<float>(key >> 31 ? key ^ 0x80000000 : ~key);
}

// Raises the row's threshold as top-k and top-p say. top: its largest score.
template <class E>
inline void keep_largest(Row<E>& row, float top) {
  const Processing& p = row.processing;
  const auto k = static_cast<uint64_t>(p.top_k);
  if (k > 0 && p.top_k < row.size) row.threshold = select(row, nullptr, [&](uint64_t n) { return n >= k; });
  if (p.top_p < 1) {
    const uint64_t total = fixed_total(row, top, 1);
    row.threshold = std::max(row.threshold, select(row, &top, [&](uint64_t w) { return reaches(w, total, p.top_p); }));
  }
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
