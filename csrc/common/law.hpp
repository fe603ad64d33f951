// The law of one token that a row of logits [V] stands for, and the rules that draw from it and that compare two such
// laws: scalars for host and device, templates on Ops where vectors run the same steps (Scalar below, Vector in
// simd.hpp). Nothing here depends on how a compiler contracts a * b + c, so all devices return the same bits.
//
// score(v) = -inf where v is banned, else logit * (1 / temperature); then -inf below the row's threshold:
//   top-k   the k-th largest score, equal ones counted one by one
//   top-p   of the scores that top-k keeps, the largest s whose `reaches` holds for the weight of all scores >= s
// Scores that equal the threshold are kept. At temperature 0 the law is its largest score alone, the lowest id of equal
// ones. With top = the row's largest score, the deterministic mode (and top-p always) weighs with integers,
//   weight(v) = floor(2^40 exp(score(v) - top)), the sums of which do not depend on their order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "element.hpp"
#include "philox.hpp"

namespace pyquiet {

struct Scalar {
  using F = float;
  using I = int32_t;
  using U = uint32_t;

  PYQUIET_HD static F fill(float x) { return x; }
  PYQUIET_HD static F to_float(I x) { return static_cast<F>(x); }
  PYQUIET_HD static I truncate(F x) { return static_cast<I>(x); }
  PYQUIET_HD static F fma(F a, F b, F c) {  // always one rounding
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
  }
};

template <class To, class From>
PYQUIET_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits are neither made nor lost");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The bits of x in a register: what was computed before is rounded, and not contracted with what follows.
#if defined(__aarch64__)
#define PYQUIET_ROUNDED(x) asm("" : "+w"(x))
#elif defined(__AVX512F__)
#define PYQUIET_ROUNDED(x) asm("" : "+v"(x))
#else
#define PYQUIET_ROUNDED(x) asm("" : "+x"(x))
#endif

// a * b, rounded.
PYQUIET_HD float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  float product = a * b;
  PYQUIET_ROUNDED(product);
  return product;
#endif
}

struct Processing {
  const bool* banned;  // [V] or none
  float inverse;       // 1 / temperature, in double, then rounded; 0: greedy
  int64_t top_k;       // 0: all
  double top_p;        // 1: all

  template <class E>
  PYQUIET_HD float score(E logit, int64_t v, float threshold) const {
    const float score = banned && banned[v] ? kNegInf : multiply(to_float(logit), inverse);
    return score < threshold ? kNegInf : score;  // NaN stays
  }
};

PYQUIET_HD bool reaches(uint64_t weight, uint64_t total, double top_p) {
  return static_cast<double>(weight) >= top_p * static_cast<double>(total);
}

// c[0] + c[1] x + ...
template <class Ops, int N>
PYQUIET_HD typename Ops::F polynomial(typename Ops::F x, const float (&c)[N]) {
  typename Ops::F p = Ops::fill(c[N - 1]);
  for (int i = N - 2; i >= 0; --i) p = Ops::fma(p, x, Ops::fill(c[i]));
  return p;
}

// A weight as high * 2^20 + low, both at most 2^20.
template <class I>
struct FixedWeight {
  I high, low;
};

// floor(2^40 exp(x)) for x <= 0, to a relative 1e-7; 0 for -inf (and NaN: look for it before).
template <class Ops>
PYQUIET_HD FixedWeight<typename Ops::I> fixed_weight(typename Ops::F x) {
  using F = typename Ops::F;
  using U = typename Ops::U;
  constexpr float kLog2ELow = 1.92596299e-8f;  // log2(e) - kLog2E
  constexpr float kRound = 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer, in the low bits
  // As exp2_fraction, lowest first.
  constexpr float kExp2[] = {1.0f,
                             0.6931471824645996f,
                             0.24022646248340607f,
                             0.05550328642129898f,
                             0.009618489071726799f,
                             0.0013399930903688073f,
                             0.0001534581242594868f};
  x = x > -30.0f ? x : Ops::fill(-30.0f);
  const F shifted = Ops::fma(x, Ops::fill(kLog2E), Ops::fill(kRound));
  const F whole = shifted - kRound;
  F fraction = Ops::fma(x, Ops::fill(kLog2E), -whole);
  fraction = Ops::fma(x, Ops::fill(kLog2ELow), fraction);
  const F power = bit_cast<F>((bit_cast<U>(shifted) + (127 + 20)) << 23);
  const F scaled = polynomial<Ops>(fraction, kExp2) * power;  // 2^20 exp(x); from here on all is exact
  const auto high = Ops::truncate(scaled);
  return {high, Ops::truncate((scaled - Ops::to_float(high)) * 0x1p20f)};
}

PYQUIET_HD uint64_t fixed_weight(float x) {
  const FixedWeight<int32_t> w = fixed_weight<Scalar>(x);
  return (static_cast<uint64_t>(w.high) << 20) + static_cast<uint64_t>(w.low);
}

// Probabilities in units of 2^-62: weight * (2^62 / total), two roundings and one floor. `total` is the row's sum of
// weights.
PYQUIET_HD double probability_unit(uint64_t total) { return 0x1p62 / static_cast<double>(total); }
PYQUIET_HD int64_t fixed_probability(uint64_t weight, double unit) {
  return static_cast<int64_t>(static_cast<double>(weight) * unit);
}

// A draft of probability p under its own law and q under the target's is accepted if u p < q: never where q is 0,
// always where p alone is. If it is not, and the mass of max(q - p, 0) is above `kNoResidual`, that is the law of its
// replacement, else q is.
constexpr double kNoResidual = 1e-7;

PYQUIET_HD bool accepts_fixed(double u, int64_t q, int64_t p) {
  return u * static_cast<double>(p) < static_cast<double>(q);
}

// log_q and log_p as they come, -inf included.
PYQUIET_HD bool accepts(double u, double log_q, double log_p) { return log_q > kNegInf && log(u) < log_q - log_p; }

// The inverse of a CDF of integers: the first id whose cumulative weight exceeds this.
PYQUIET_HD uint64_t cdf_threshold(double u, uint64_t total) {
  const auto threshold = static_cast<uint64_t>(u * static_cast<double>(total));
  return threshold < total ? threshold : total - 1;
}

// y = 2^exponent (1 + r) for a positive, normal y, r in [sqrt(1/2) - 1, sqrt(2) - 1].
template <class Ops>
struct Logarithm {
  typename Ops::F exponent, r;

  PYQUIET_HD static Logarithm of(typename Ops::F y) {
    using I = typename Ops::I;
    constexpr int32_t kRootHalf = 0x3f3504f3;
    const I bits = bit_cast<I>(y) - kRootHalf;
    return {Ops::to_float(bits >> 23), bit_cast<typename Ops::F>((bits & 0x7fffff) + kRootHalf) - 1.0f};
  }

  // log(1 + r) / r to 3e-8.
  PYQUIET_HD typename Ops::F value() const {
    constexpr float kLog1p[] = {1.0f,
                                -0.4999999701976776f,
                                0.33334192633628845f,
                                -0.250013530254364f,
                                0.19955933094024658f,
                                -0.1657799333333969f,
                                0.14977401494979858f,
                                -0.14269258081912994f,
                                0.08533313125371933f};
    return Ops::fma(exponent, Ops::fill(kLn2), r * polynomial<Ops>(r, kLog1p));
  }
};

// Gumbel noise -log(-log(u)), u the uniform of a block half (its words: `low`, then `high`), to 3e-7 of its size or 1;
// of u and 1 - u the first 48 bits count, so it is coarser where one of them is below 2^-26.
template <class Ops>
PYQUIET_HD typename Ops::F gumbel_noise(typename Ops::U high, typename Ops::U low) {
  using F = typename Ops::F;
  using I = typename Ops::I;
  // Above 1/2, -log(u) is made of 1 - u, the same bits flipped.
  const auto near_one = bit_cast<I>(high) < 0;
  const I flip = near_one ? I{} + 0xffffff : I{};
  const I coarse = bit_cast<I>(high >> 8) ^ flip, fine = bit_cast<I>((high & 0xff) << 16 | low >> 16) ^ flip;
  const F a = Ops::fma(Ops::to_float(coarse), Ops::fill(0x1p-24f),
                       Ops::fma(Ops::to_float(fine), Ops::fill(0x1p-48f), Ops::fill(0x1p-49f)));  // (0, 1/2]
  const auto small = a <= 0.29289321f;  // then 1 - a needs no rounding: r is -a
  Logarithm<Ops> log_u = Logarithm<Ops>::of(a);
  log_u.r = near_one ? (small ? -a : Ops::fma(a, Ops::fill(-2.0f), Ops::fill(1.0f))) : log_u.r;
  log_u.exponent = near_one ? (small ? Ops::fill(0.0f) : Ops::fill(-1.0f)) : log_u.exponent;
  return -Logarithm<Ops>::of(-log_u.value()).value();
}

PYQUIET_HD float gumbel_noise(const PhiloxBlock& block, int half) {
  return gumbel_noise<Scalar>(block.word[2 * half + 1], block.word[2 * half]);
}

}  // namespace pyquiet
