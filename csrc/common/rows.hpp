// Passes over a row of logits on the CPU: its law, its largest scores, its weights and the draws from them. A row is
// cut in chunks of a fixed size, each of which is read into a buffer in L1 as scores and worked on there, and what
// chunks yield is put together in their order; so the results do not depend on how many threads share the chunks.
//
// What the float mode costs: one reading from memory, one exp an element for the law; draws look again at one part of a
// chunk each, or, where there is but one of them (draw_once), at one chunk. The residual reads both rows again, from
// L2, where one thread has just read them.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "simd.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

constexpr int kChunk = 2048;
constexpr int kPart = 128;  // of a chunk: what a draw looks at again
constexpr int kParts = kChunk / kPart;
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

// The lanes of v put together: halves of the vector, again and again.
template <class V, class Join>
inline auto join_lanes(V v, Join join) {
  using T = std::remove_reference_t<decltype(v[0])>;
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return join(v[0], v[1]);
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    return join_lanes(join(half[0], half[1]), join);
  }
}

inline float largest_lane(F v) {
  return join_lanes(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline double sum_of_lanes(D v) {
  return join_lanes(v, [](auto a, auto b) { return a + b; });
}

template <class T>
inline D to_doubles(const T* p) {
  typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
  Half half;
  std::memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, D);
}

// Half as many sums, in double.
inline D halved(F v) {
  float lane[kLanes];
  store(lane, v);
  return to_doubles(lane) + to_doubles(lane + kLanes / 2);
}

inline double sum_of_lanes(F v) { return sum_of_lanes(halved(v)); }

// Of n vectors at once, a multiple of the lanes of D.
inline void sums_of_lanes(const F* v, int n, double* sums) {
  constexpr int kTogether = kLanes / 2;
  for (int i = 0; i < n; i += kTogether) {
    D rows[kTogether];
    for (int k = 0; k < kTogether; ++k) rows[k] = halved(v[i + k]);
    const D together = sum_rows(rows);
    std::memcpy(sums + i, &together, sizeof together);
  }
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

  // The same of a plain chunk, in an order of its own.
  [[gnu::always_inline]] void plain_block(int64_t v, F (&x)[4]) const {
    if constexpr (sizeof(E) == 4) return block<true>(v, x);
    fetch(v);
    if constexpr (sizeof(E) == 2)
      for (int u = 0; u < 4; u += 2) load_pairs(logits + v + u * kLanes, x[u], x[u + 1]);
  }

  F masked(F x, int64_t v) const {
    if (processing.banned) {
      x = load_bytes(processing.banned + v) != 0 ? fill(kNegInf) : x;
    }
    return x < threshold ? fill(kNegInf) : x;
  }

  // Memory that is read soon, into L2: the processor's own prefetching leaves gaps where exponentials take the time,
  // and into L1 too few lines are on their way at once. (Inlined, or g++ takes it for a function without effect and
  // drops the call.)
  [[gnu::always_inline]] void fetch(int64_t v) const {
    constexpr size_t kAhead = 16384;
    const char* line = reinterpret_cast<const char*>(logits + v) + kAhead;
    for (size_t i = 0; i < kBlock * sizeof(E); i += 64) __builtin_prefetch(line + i, 0, 2);
  }
};

// use(std::true_type) or use(std::false_type)
template <class Use>
inline void if_plain(bool plain, Use use) {
  plain ? use(std::true_type()) : use(std::false_type());
}

// Weights are exp(score - shift) 2^-power, for the sake of speed with a shift of 0 where scores are not too large.
struct Base {
  float shift, power;

  static Base near(float score, bool far) {
    return far ? Base{std::nearbyint(score), 0} : Base{0, std::nearbyint(score * kLog2E)};
  }
  bool operator==(const Base& other) const { return shift == other.shift && power == other.power; }
  // The score of weight 1; by the kLog2E that the weights are computed with.
  double score() const { return shift + power / static_cast<double>(kLog2E); }
};
constexpr float kFarScore = 1 << 17;

// What the first pass over a row yields: of chunk c the largest score, the sum of weights to a base near it and, once
// all are read, the factor that makes it a part of the row's.
//
// Where draws may follow, also the row's CDF at the end of every part of a chunk, in double, of float sums of the 8
// terms that meet in a lane (32 without AVX): so a part loses no more than its terms do, 1e-7 of itself.
struct Survey {
  std::vector<float> tops;
  std::vector<Base> bases;
  std::vector<double> factors, sums, cdf;
  float top;
  double total;  // of exp(score - top)

  bool sound() const { return top > kNegInf && total < std::numeric_limits<double>::infinity(); }  // not NaN either
  double lse() const { return top + std::log(total); }

  void resize(int64_t chunks) {
    tops.assign(chunks, kNegInf);
    bases.assign(chunks, Base{kNegInf, 0});
    factors.resize(chunks);
    sums.resize(chunks);
    cdf.resize(chunks * kParts);  // until they are merged, the parts' own sums
  }

  void merge(bool draws) {
    top = *std::max_element(tops.begin(), tops.end());
    const double base = top > kNegInf ? top : 0;
    for (size_t c = 0; c < bases.size(); ++c)
      factors[c] = c > 0 && bases[c] == bases[c - 1] ? factors[c - 1] : std::exp(bases[c].score() - base);
    total = 0;
    for (size_t c = 0; c < sums.size(); ++c) {
      double sum = 0;  // of the chunk alone: no addition waits for those of other chunks
      if (draws) {
        for (size_t i = c * kParts; i < (c + 1) * kParts; ++i) cdf[i] = total + (sum += cdf[i] * factors[c]);
      } else {
        sum = sums[c] * factors[c];
      }
      total += sum;
    }
  }
};

// The sum over a chunk, in one pass: the base is near the largest score of the first block that has any, or of a later
// one that leaves it far behind: exponentials of large numbers are less exact. False where scores turn out to be too
// large and kFar is needed.
template <bool kPlain, bool kOfParts, bool kFar, class E>
inline bool survey_chunk(const Row<E>& row, int64_t c, Survey& to) {
  constexpr float kRise = 16.0f;
  Exp exp;
  F sum[4] = {}, top = fill(kNegInf);
  F parts[kParts] = {};  // before the one that is being read
  int part = 0;
  Base base{};
  float limit = kNegInf;
  for (int64_t v = c * kChunk; v < row.end(c); v += kBlock) {
    if (kOfParts && v % kPart == 0 && v > c * kChunk) {
      parts[part++] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (F& one : sum) one = F{};
    }
    F x[4];
    if constexpr (kPlain) {
      row.plain_block(v, x);
    } else {
      row.block(v, x);
    }
    const F largest = max(max(x[0], x[1]), max(x[2], x[3]));
    top = max(largest, top);
    if (__builtin_expect(any_above(largest, limit), 0)) {
      const float score = largest_lane(largest);
      if (!kFar && std::fabs(score) > kFarScore) return false;
      const Base next = Base::near(score, kFar);
      const auto factor = limit > kNegInf ? static_cast<float>(std::exp(base.score() - next.score())) : 0.0f;
      for (F& one : sum) one *= factor;
      for (F& one : parts) one *= factor;
      base = next;
      limit = static_cast<float>(base.score()) + kRise;
      exp.set_base(base.power);
    }
    for (int u = 0; u < 4; ++u) {
      F fraction;
      const F power = exp.power(kFar ? x[u] - base.shift : x[u], fraction);
      sum[u] = Vector::fma(power, fraction, sum[u]);
    }
  }
  parts[part] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  to.tops[c] = largest_lane(top);
  if (limit > kNegInf) to.bases[c] = base;
  to.sums[c] = sum_of_lanes(parts[part]);
  if (kOfParts) sums_of_lanes(parts, kParts, &to.cdf[c * kParts]);
  return true;
}

template <bool kPlain, bool kOfParts, class E>
inline void survey_chunk(const Row<E>& row, int64_t c, Survey& to) {
  if constexpr (Exp::kHasBase)
    if (survey_chunk<kPlain, kOfParts, false>(row, c, to)) return;
  survey_chunk<kPlain, kOfParts, true>(row, c, to);
}

// With `draws`, they may follow.
template <class E>
inline void survey_rows(const Row<E>* const* rows, Survey* const* surveys, int count, bool draws, int threads) {
  const int64_t chunks = rows[0]->chunks();
  for (int r = 0; r < count; ++r) surveys[r]->resize(chunks);
  in_parallel(count * chunks, threads, [&](int64_t i) {
    const int64_t r = i / chunks, c = i % chunks;
    if_plain(rows[r]->plain(c), [&](auto plain) {
      draws ? survey_chunk<plain, true>(*rows[r], c, *surveys[r])
            : survey_chunk<plain, false>(*rows[r], c, *surveys[r]);
    });
  });
  for (int r = 0; r < count; ++r) surveys[r]->merge(draws);
}

template <class E>
inline void survey_row(const Row<E>& row, Survey& survey, bool draws, int threads) {
  const Row<E>* const one = &row;
  Survey* const its = &survey;
  survey_rows(&one, &its, 1, draws, threads);
}

// The first id with that score.
template <class E>
inline int64_t find(const Row<E>& row, const Survey& survey) {
  int64_t c = std::find(survey.tops.begin(), survey.tops.end(), survey.top) - survey.tops.begin();
  int64_t v = c * kChunk;
  while (row.score(v) != survey.top) ++v;
  return v;
}

// Among groups of weights, the first at whose end their cumulative sum, begun at `before`, is above the threshold, or
// else the last of positive weight; and the sum before it.
template <class Sum>
struct Place {
  int64_t at;
  Sum before;

  template <class Total>
  static Place find(int64_t groups, Sum before, Sum threshold, Total total) {
    Place place{0, before};
    Sum sum = before;
    for (int64_t i = 0; i < groups; ++i) {  // to the end: where it lies cannot be guessed, and groups are few
      const Sum one = total(i);
      const bool here = (one > 0) & !(sum > threshold);
      place.at = here ? i : place.at;
      place.before = here ? sum : place.before;
      sum += one;
    }
    return place;
  }
};

inline double sum_of_lanes(const float* weights) { return sum_of_lanes(load(weights)); }
template <class Integer>
inline uint64_t sum_of_lanes(const Integer* weights) {
  return std::accumulate(weights, weights + kLanes, uint64_t{0});
}

// Of a chunk's weights, in whole blocks: the first id above the threshold.
template <class Weight, class Sum>
inline int64_t first_above(const Weight* weights, int n, Sum before, Sum threshold) {
  const auto lanes = Place<Sum>::find((n + kLanes - 1) / kLanes, before, threshold,
                                      [&](int64_t i) { return sum_of_lanes(weights + i * kLanes); });
  const auto one = Place<Sum>::find(kLanes, lanes.before, threshold,
                                    [&](int64_t i) { return static_cast<Sum>(weights[lanes.at * kLanes + i]); });
  return lanes.at * kLanes + one.at;
}

// u times the sum of all weights, and below it.
inline double below(double u, double total) { return std::min(u * total, std::nextafter(total, 0.0)); }

// The weights of a row surveyed for draws, in the units of its CDF.
template <class E>
struct FloatWeights {
  using Weight = float;
  using Sum = double;
  const Row<E>& row;
  const Survey& survey;

  const std::vector<Sum>& cdf() const { return survey.cdf; }
  Sum threshold(double u) const { return below(u, survey.cdf.back()); }

  // Of the ids of a block, and their sum.
  Sum block(int64_t v, Weight* weights) const {
    const Base base = survey.bases[v / kChunk];
    const Exp exp(base.power);
    const auto factor = static_cast<float>(survey.factors[v / kChunk]);
    F x[4];
    row.block(v, x);
    for (int u = 0; u < 4; ++u) store(weights + u * kLanes, x[u] = exp(x[u] - base.shift) * factor);
    return sum_of_lanes((x[0] + x[1]) + (x[2] + x[3]));
  }
};

// Where the cumulative sums, ascending, come above a threshold that is below the last.
template <class Sum>
inline int64_t first_sum_above(const std::vector<Sum>& sums, Sum threshold) {
  const Sum* from = sums.data();
  for (size_t n = sums.size(); n > 1; n -= n / 2)  // a branch would be guessed wrong every other time
    from += -static_cast<size_t>(!(from[n / 2 - 1] > threshold)) & n / 2;
  return from - sums.data();
}

// The id at which the CDF of the weights comes above the threshold, in a part that has it; `before`: at its begin.
template <class Weights, class Sum = typename Weights::Sum>
inline int64_t draw_from_part(const Weights& of, int64_t part, Sum before, Sum threshold,
                              typename Weights::Weight* weights) {
  const int64_t begin = part * kPart, size = std::min<int64_t>(kPart, of.row.size - begin);
  const auto block = Place<Sum>::find((size + kBlock - 1) / kBlock, before, threshold,
                                      [&](int64_t i) { return of.block(begin + i * kBlock, weights + i * kBlock); });
  return begin + block.at * kBlock + first_above(weights + block.at * kBlock, kBlock, block.before, threshold);
}

// take(j, id), for each of k draws: the id at which the CDF of the weights comes above threshold(uniform(j)). What does
// not wait for a weight is done for many draws at a time, so that it runs side by side.
template <class Weights, class Uniform, class Take>
inline void draw(const Weights& of, int64_t k, Uniform uniform, Take take) {
  constexpr int64_t kTogether = 32;
  typename Weights::Sum thresholds[kTogether];
  int64_t parts[kTogether];
  alignas(64) typename Weights::Weight weights[kPart] = {};
  for (int64_t first = 0; first < k; first += kTogether) {
    const int64_t n = std::min(kTogether, k - first);
    for (int64_t j = 0; j < n; ++j) thresholds[j] = of.threshold(uniform(first + j));
    for (int64_t j = 0; j < n; ++j) parts[j] = first_sum_above(of.cdf(), thresholds[j]);
    for (int64_t j = 0; j < n; ++j) {
      const auto before = parts[j] ? of.cdf()[parts[j] - 1] : typename Weights::Sum{0};
      take(first + j, draw_from_part(of, parts[j], before, thresholds[j], weights));
    }
  }
}

template <class Weights>
inline int64_t draw(const Weights& of, double u) {
  int64_t id = 0;
  draw(of, 1, [&](int64_t) { return u; }, [&](int64_t, int64_t y) { id = y; });
  return id;
}

// One draw by float weights after a survey without parts: those of the chunk where it falls are read now.
template <class E>
inline int64_t draw_once(const Row<E>& row, Survey& survey, double u) {
  const double threshold = below(u, survey.total);
  const auto chunk =
      Place<double>::find(row.chunks(), 0.0, threshold, [&](int64_t c) { return survey.sums[c] * survey.factors[c]; });
  if_plain(row.plain(chunk.at), [&](auto plain) { survey_chunk<plain, true>(row, chunk.at, survey); });
  const int64_t first = chunk.at * kParts;
  const auto part = Place<double>::find(kParts, chunk.before, threshold,
                                        [&](int64_t i) { return survey.cdf[first + i] * survey.factors[chunk.at]; });
  alignas(64) float weights[kPart] = {};
  return draw_from_part(FloatWeights<E>{row, survey}, first + part.at, part.before, threshold, weights);
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
