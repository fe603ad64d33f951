// Passes over a row of logits on the CPU: its law, its largest scores, its weights and the draws from them. A row is
// cut in chunks of a fixed size, each of which is read into a buffer in L1 as scores and worked on there, and what
// chunks yield is put together in their order; so the results do not depend on how many threads share the chunks.
//
// What the float mode costs: one reading from memory, one exp an element for the law; a draw looks again at one chunk.
// The residual reads both rows again, from L2, where one thread has just read them.
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

// Terms of a sum that is in double but for those that meet in one lane of four vectors: their sum is rounded, to 2^-24
// of itself, as each of them is.
struct ExactSum {
  D low{}, high{};

  [[gnu::always_inline]] void add(F x) {
    float four[kLanes];
    store(four, x);
    low += to_doubles(four);
    high += to_doubles(four + kLanes / 2);
  }
  [[gnu::always_inline]] void add_products(const F (&x)[4], const F (&y)[4]) {
    add(Vector::fma(x[0], y[0], x[1] * y[1]) + Vector::fma(x[2], y[2], x[3] * y[3]));
  }
  void operator*=(double factor) { low *= factor, high *= factor; }
  double total() const {
    const D all = low + high;
    double total = 0;
    for (int i = 0; i < kLanes / 2; ++i) total += all[i];
    return total;
  }
};

// In float all the way.
struct QuickSum {
  F sum[4] = {};

  [[gnu::always_inline]] void add_products(const F (&x)[4], const F (&y)[4]) {
    for (int u = 0; u < 4; ++u) sum[u] = Vector::fma(x[u], y[u], sum[u]);
  }
  void operator*=(double factor) {
    for (F& one : sum) one *= static_cast<float>(factor);
  }
  double total() const {
    const F all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    double total = 0;
    for (int i = 0; i < kLanes; ++i) total += all[i];
    return total;
  }
};

// One row's logits and what makes them scores.
template <class E>
struct Row {
  const E* logits;
  int64_t size;
  Processing processing;
  float threshold = kNegInf;

  int64_t chunks() const { return (size + kChunk - 1) / kChunk; }
  int length(int64_t c) const { return static_cast<int>(std::min<int64_t>(kChunk, size - c * kChunk)); }
  int64_t end(int64_t c) const { return std::min<int64_t>((c + 1) * kChunk, size); }
  float score(int64_t v) const { return processing.score(logits[v], v, threshold); }
  bool filtered() const { return processing.top_k > 0 || processing.top_p < 1; }

  // Whether the scores of a chunk are its logits, in whole blocks.
  bool plain(int64_t c) const {
    return processing.inverse == 1 && !processing.banned && threshold == kNegInf && (end(c) - c * kChunk) % kBlock == 0;
  }

  // The scores of ids v .. v + kBlock - 1, -inf after the last.
  template <bool kPlain = false>
  [[gnu::always_inline]] void block(int64_t v, F (&x)[4]) const {
    if (!kPlain && __builtin_expect(v + kBlock > size, 0)) {
      float tail[kBlock];
      for (int i = 0; i < kBlock; ++i) tail[i] = v + i < size ? score(v + i) : kNegInf;
      for (int u = 0; u < 4; ++u) x[u] = load(tail + u * kLanes);
      return;
    }
    fetch(v);
    for (int u = 0; u < 4; ++u) x[u] = load(logits + v + u * kLanes);
    if constexpr (kPlain) return;
    for (int u = 0; u < 4; ++u) {
      x[u] *= processing.inverse;
      PYQUIET_ROUNDED(x[u]);
      x[u] = masked(x[u], v + u * kLanes);
    }
  }

  F masked(F x, int64_t v) const {
    if (processing.banned) {
      x = load_bytes(processing.banned + v) != 0 ? fill(kNegInf) : x;
    }
    return x < threshold ? fill(kNegInf) : x;
  }

  // Memory that is read soon, into L1: the processor's own prefetching leaves gaps where exponentials take the time.
  // (Inlined, or g++ takes it for a function without effect and drops the call.)
  [[gnu::always_inline]] void fetch(int64_t v) const {
    constexpr size_t kAhead = 2048;
    const char* line = reinterpret_cast<const char*>(logits + v) + kAhead;
    for (size_t i = 0; i < kBlock * sizeof(E); i += 64) __builtin_prefetch(line + i);
  }
};

// use(std::true_type) or use(std::false_type)
template <class Use>
inline void if_plain(bool plain, Use use) {
  plain ? use(std::true_type()) : use(std::false_type());
}

// What the first pass over a row yields: of chunk c the largest score, the sum of exp(score - base) with a base near it
// and, once all are read, the factor exp(base - top) of that sum.
struct Survey {
  std::vector<float> tops, bases, factors;
  std::vector<double> sums;
  float top;
  double total;

  bool sound() const { return top > kNegInf && total < std::numeric_limits<double>::infinity(); }  // not NaN either
  double lse() const { return top + std::log(total); }

  void resize(int64_t chunks) {
    tops.assign(chunks, kNegInf);
    bases.assign((chunks + kLanes - 1) / kLanes * kLanes, kNegInf);
    factors.resize(bases.size());
    sums.resize(chunks);
  }

  void merge() {
    top = *std::max_element(tops.begin(), tops.end());
    const float base = top > kNegInf ? top : 0.0f;
    for (size_t c = 0; c < bases.size(); c += kLanes) store(&factors[c], Exp()(load(&bases[c]) - base));
    total = 0;
    for (size_t c = 0; c < sums.size(); ++c) total += sums[c] * factors[c];
  }
};

// The sum over a chunk, in one pass: the base is the largest score of the first block that has any, or of a later one
// that leaves it far behind, so that a float holds every term.
template <bool kPlain, class Sum, class E>
inline void survey_chunk(const Row<E>& row, int64_t c, Survey& to) {
  constexpr float kFar = 60.0f;
  const Exp exp;
  Sum sum;
  F top = fill(kNegInf);
  float base = kNegInf, limit = kNegInf, shift = 0;
  for (int64_t v = c * kChunk; v < row.end(c); v += kBlock) {
    F x[4];
    row.template block<kPlain>(v, x);
    const F largest = max(max(x[0], x[1]), max(x[2], x[3]));
    top = max(largest, top);
    if (__builtin_expect(any_above(largest, limit), 0)) {
      shift = largest_lane(largest);
      sum *= base > kNegInf ? std::exp(base - shift) : 0.0f;
      base = shift;
      limit = base + kFar;
    }
    F fraction[4];
    for (int u = 0; u < 4; ++u) x[u] = exp.power(x[u] - shift, fraction[u]);
    sum.add_products(x, fraction);
  }
  to.tops[c] = largest_lane(top);
  to.bases[c] = base;
  to.sums[c] = sum.total();
}

// With `exact`, a draw may use the sums: they are in double inside of the chunks, too.
template <class E>
inline void survey_rows(const Row<E>* const* rows, Survey* const* surveys, int count, bool exact, int threads) {
  const int64_t chunks = rows[0]->chunks();
  for (int r = 0; r < count; ++r) surveys[r]->resize(chunks);
  in_parallel(count * chunks, threads, [&](int64_t i) {
    const int64_t r = i / chunks, c = i % chunks;
    if_plain(rows[r]->plain(c), [&](auto plain) {
      exact ? survey_chunk<plain, ExactSum>(*rows[r], c, *surveys[r])
            : survey_chunk<plain, QuickSum>(*rows[r], c, *surveys[r]);
    });
  });
  for (int r = 0; r < count; ++r) surveys[r]->merge();
}

template <class E>
inline void survey_row(const Row<E>& row, Survey& survey, bool exact, int threads) {
  const Row<E>* const one = &row;
  Survey* const its = &survey;
  survey_rows(&one, &its, 1, exact, threads);
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
  alignas(64) float weights[kChunk];
  for (int64_t v = c * kChunk; v < row.end(c); v += kBlock) {
    F x[4];
    row.block(v, x);
    for (int u = 0; u < 4; ++u) store(weights + v % kChunk + u * kLanes, Exp()(x[u] - survey.bases[c]));
  }
  const double factor = survey.factors[c];
  return c * kChunk + first_above(weights, row.length(c), before / factor, u * survey.total / factor);
}

// Sixteen (eight, four) tokens' noise from half as many blocks; token `v` is even.
struct Noise {
  W sequence, position, step, block;  // block: of the first token
  uint64_t seed;

  Noise(const PhiloxBlock& counter, uint64_t key)
      : sequence(counter.word[0] - W{}), position(counter.word[1] - W{}), step(counter.word[2] - W{}), seed(key) {
    for (int i = 0; i < kLanes / 2; ++i) block[i] = uint64_t{counter.word[3]} + static_cast<uint64_t>(i);
  }

  F of(int64_t v) const {
    W c0 = sequence, c1 = position, c2 = step, c3 = block + static_cast<uint64_t>(v / 2);
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
    F most = fill(kNegInf);
    I from{};
    for (int64_t v = c * kChunk; v < row.end(c); v += kBlock) {
      F x[4];
      row.block(v, x);
      for (int u = 0; u < 4; ++u) {
        const int64_t at = v + u * kLanes;
        const F value = x[u] + noise.of(at);
        const auto better = value > most;
        most = better ? value : most;
        from = better ? fill(static_cast<int32_t>(at)) : from;
      }
    }
    best[c] = {kNegInf, 0};
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t v = from[lane] + lane;
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
