// Passes over a row of logits on the CPU: its law, its largest scores, its weights and the draws from them. A row is
// cut in chunks of a fixed size, each of which is read into a buffer in L1 as scores and worked on there, and what
// chunks yield is put together in their order; so the results do not depend on how many threads share the chunks.
//
// What the float mode costs: one reading from memory, one exp an element for the law; a draw looks again at one chunk.
// The residual reads both rows again, from L2, where one thread has just read them. Each chunk's exponentials are of
// its own largest score, so no sum is ever rescaled inside a chunk. While they are computed, the next chunk is fetched.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

constexpr int kChunk = 2048;
constexpr int kBlock = 4 * kLanes;  // elements that loops take at once

// Static shares: of the same chunks, a thread has the same in every pass over a row.
template <class Run>
inline void in_parallel(int64_t n, int threads, Run run) {
  threads = static_cast<int>(std::min<int64_t>(threads, n));
  if (threads <= 1) {  // without OpenMP: this may be inside of a parallel region
    for (int64_t i = 0; i < n; ++i) run(i);
    return;
  }
#pragma omp parallel num_threads(threads)
#pragma omp for schedule(static)
  for (int64_t i = 0; i < n; ++i) run(i);
}

// Whole rows or sequences, which differ in what they cost.
template <class Run>
inline void in_parallel_dynamic(int64_t n, int threads, Run run) {
#pragma omp parallel num_threads(threads) if (n > 1)
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < n; ++i) run(i);
}

struct alignas(64) Buffer {
  float score[kChunk];
};

inline float largest_lane(F v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, v[i]);
  return largest;
}

template <class T>
inline D to_doubles(const T* p) {
  typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, D);
}

// The sum of n floats in double; n a multiple of kLanes.
inline double sum_in_double(const float* p, int n) {
  D sum[2] = {};
  for (int i = 0; i < n; i += kLanes) {
    sum[0] += to_doubles(p + i);
    sum[1] += to_doubles(p + i + kLanes / 2);
  }
  sum[0] += sum[1];
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += sum[0][i];
  return total;
}

// One row's logits and what makes them scores.
template <class E>
struct Row {
  const E* logits;
  int64_t size;
  Processing processing;
  float threshold = kNegInf;

  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
  int length(int64_t c) const { return static_cast<int>(std::min<int64_t>(kChunk, size - c * kChunk)); }
  // In whole blocks.
  int padded(int64_t c) const { return (length(c) + kBlock - 1) / kBlock * kBlock; }
  float score(int64_t v) const { return processing.score(logits[v], v, threshold); }
  bool filtered() const { return processing.top_k > 0 || processing.top_p < 1; }

  // The scores of a chunk, then -inf up to a whole block. Returns the largest, but for NaN.
  float read(int64_t c, Buffer& to) const {
    return processing.banned || threshold > kNegInf ? read_as<true>(c, to) : read_as<false>(c, to);
  }

  template <bool kMasked>
  float read_as(int64_t c, Buffer& to) const {
    const int64_t begin = c * kChunk;
    const int n = length(c), whole = n / kBlock * kBlock;
    F top[4] = {fill(kNegInf), fill(kNegInf), fill(kNegInf), fill(kNegInf)};
    for (int i = 0; i < whole; i += kBlock)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int at = i + u * kLanes;
        F x = load(logits + begin + at) * processing.inverse;
        PYQUIET_ROUNDED(x);
        if constexpr (kMasked) x = masked(x, begin + at);
        store(to.score + at, x);
        top[u] = max(x, top[u]);
      }
    if (whole < n) {
      for (int i = whole; i < whole + kBlock; ++i) to.score[i] = i < n ? score(begin + i) : kNegInf;
      for (int u = 0; u < 4; ++u) top[u] = max(load(to.score + whole + u * kLanes), top[u]);
    }
    return largest_lane(max(max(top[0], top[1]), max(top[2], top[3])));
  }

  F masked(F x, int64_t v) const {
    if (processing.banned) {
      typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
      Bytes bytes;
      std::memcpy(&bytes, processing.banned + v, sizeof bytes);
      x = __builtin_convertvector(bytes, I) != 0 ? fill(kNegInf) : x;
    }
    return x < threshold ? fill(kNegInf) : x;
  }

  // Fetches what a loop over chunk c reads at the same place of the next one.
  void fetch_next(int64_t c, int at) const {
    const char* line = reinterpret_cast<const char*>(logits + (c + 1) * kChunk + at);
    for (size_t i = 0; i < kBlock * sizeof(E); i += 64) __builtin_prefetch(line + i);
  }
};

// What the first pass over a row yields: chunk c's largest score, sum of exp(score - that) and, once all are read,
// the factor exp(that - top) of the sum.
struct Survey {
  std::vector<float> tops, factors;
  std::vector<double> sums;
  float top;
  double total;

  bool sound() const { return top > kNegInf && total < std::numeric_limits<double>::infinity(); }  // not NaN either
  double lse() const { return top + std::log(total); }

  void resize(int64_t chunks) {
    tops.assign((chunks + kLanes - 1) / kLanes * kLanes, kNegInf);
    factors.resize(tops.size());
    sums.resize(chunks);
  }

  template <bool kExact, class E>
  void read(const Row<E>& row, int64_t c) {
    Buffer chunk;
    const float largest = row.read(c, chunk), base = largest > kNegInf ? largest : 0.0f;
    const int n = row.padded(c);
    F sum[4] = {};
    D exact[4] = {};
    for (int i = 0; i < n; i += kBlock) {
      row.fetch_next(c, i);
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const F weight = exp2_or_zero((load(chunk.score + i + u * kLanes) - base) * kLog2E);
        if constexpr (kExact) {
          float halves[kLanes];
          store(halves, weight);
          exact[u] += to_doubles(halves) + to_doubles(halves + kLanes / 2);
        } else {
          sum[u] += weight;
        }
      }
    }
    tops[c] = largest;
    sums[c] = 0;
    const F all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const D all_exact = (exact[0] + exact[1]) + (exact[2] + exact[3]);
    for (int i = 0; i < kLanes; ++i) sums[c] += all[i];
    for (int i = 0; i < kLanes / 2; ++i) sums[c] += all_exact[i];
  }

  void merge() {
    top = *std::max_element(tops.begin(), tops.end());
    const float base = top > kNegInf ? top : 0.0f;
    for (size_t c = 0; c < tops.size(); c += kLanes) store(&factors[c], exp2_or_zero((load(&tops[c]) - base) * kLog2E));
    total = 0;
    for (size_t c = 0; c < sums.size(); ++c) total += sums[c] * factors[c];
  }
};

// With `exact`, a draw may use the sums: they are in double inside of the chunks, too.
template <class E>
inline void survey_rows(const Row<E>* rows, Survey* surveys, int count, bool exact, int threads) {
  const int64_t chunks = rows[0].chunks();
  for (int r = 0; r < count; ++r) surveys[r].resize(chunks);
  in_parallel(count * chunks, threads, [&](int64_t i) {
    const int64_t r = i / chunks, c = i % chunks;
    exact ? surveys[r].template read<true>(rows[r], c) : surveys[r].template read<false>(rows[r], c);
  });
  for (int r = 0; r < count; ++r) surveys[r].merge();
}

// The first id with that score.
template <class E>
inline int64_t find(const Row<E>& row, const Survey& survey) {
  int64_t c = std::find(survey.tops.begin(), survey.tops.end(), survey.top) - survey.tops.begin();
  int64_t v = c * kChunk;
  while (row.score(v) != survey.top) ++v;
  return v;
}

// Walks up the cumulative weights of one chunk: the first id above `threshold`, or else the last of positive weight.
template <class Weight, class Sum>
inline int first_above(const Weight* weights, int n, Sum sum, Sum threshold) {
  int last = 0;
  for (int i = 0; i < n; ++i) {
    if (!(weights[i] > 0)) continue;
    last = i;
    sum += static_cast<Sum>(weights[i]);
    if (sum > threshold) break;
  }
  return last;
}

// The chunk in which the cumulative sum comes above `threshold`, and the sum before it.
template <class Sum>
inline int64_t chunk_above(const std::vector<Sum>& sums, Sum threshold, Sum& before) {
  int64_t last = 0;
  Sum sum = 0;
  for (size_t c = 0; c < sums.size(); ++c) {
    if (!(sums[c] > 0)) continue;
    last = static_cast<int64_t>(c);
    before = sum;
    sum += sums[c];
    if (sum > threshold) break;
  }
  return last;
}

// The id at which the row's CDF exceeds u; of an exact survey.
template <class E>
inline int64_t draw(const Row<E>& row, const Survey& survey, double u) {
  std::vector<double> sums(survey.sums);
  for (size_t c = 0; c < sums.size(); ++c) sums[c] *= survey.factors[c];
  double before = 0;
  const int64_t c = chunk_above(sums, u * survey.total, before);
  Buffer chunk;
  const int n = (row.read(c, chunk), row.padded(c));
  for (int i = 0; i < n; i += kLanes)
    store(chunk.score + i, exp2_or_zero((load(chunk.score + i) - survey.tops[c]) * kLog2E));
  const double factor = survey.factors[c];
  return c * kChunk + first_above(chunk.score, n, before / factor, u * survey.total / factor);
}

// Sixteen (eight, four) tokens' noise from half as many blocks; token `v` is even.
struct Noise {
  W sequence, position, step;
  uint64_t seed;

  Noise(const PhiloxBlock& counter, uint64_t key)
      : sequence(counter.word[0] - W{}), position(counter.word[1] - W{}), step(counter.word[2] - W{}), seed(key) {}

  F of(int64_t v) const {
    W c0 = sequence, c1 = position, c2 = step, c3;
    for (int i = 0; i < kLanes / 2; ++i) c3[i] = uint64_t{kGumbel} << 26 | static_cast<uint64_t>(v / 2 + i);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {  // the high halves hold what nobody reads
      const W even = multiply_low(c0, uint64_t{0xD2511F53} - W{}), odd = multiply_low(c2, uint64_t{0xCD9E8D57} - W{});
      c0 = (odd >> 32) ^ c1 ^ key0;
      c1 = odd;
      c2 = (even >> 32) ^ c3 ^ key1;
      c3 = even;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    using U = Vector::U;
    return gumbel_noise<Vector>((U)((c1 & 0xffffffff) | c3 << 32), (U)((c0 & 0xffffffff) | c2 << 32));
  }
};

// argmax of score + noise, the lowest id of equal ones. `counter`: of the row's noise.
template <class E>
inline int64_t gumbel_argmax(const Row<E>& row, const PhiloxBlock& counter, uint64_t seed, int threads) {
  const Noise noise(counter, seed);
  std::vector<std::pair<float, int64_t>> best(row.chunks());
  in_parallel(row.chunks(), threads, [&](int64_t c) {
    Buffer chunk;
    row.read(c, chunk);
    F most = fill(kNegInf);
    I from{};
    for (int i = 0; i < row.padded(c); i += kLanes) {
      const F value = load(chunk.score + i) + noise.of(c * kChunk + i);
      const auto better = value > most;
      most = better ? value : most;
      from = better ? fill(i) : from;
    }
    best[c] = {kNegInf, 0};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t v = c * kChunk + from[lane] + lane;
      if (most[lane] > best[c].first || (most[lane] == best[c].first && v < best[c].second)) best[c] = {most[lane], v};
    }
  });
  auto all = best[0];
  for (const auto& one : best)
    if (one.first > all.first) all = one;
  return all.second;
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
