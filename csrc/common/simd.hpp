// Vectors of the instruction set that a file is compiled for, through the compiler's own vector
// types: one source for SSE4, AVX2, AVX-512 and NEON. Everything sits in the namespace of its ISA,
// or the linker might keep the AVX-512 copy of an inline function for all of them.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "element.hpp"
#include "law.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <int W>
struct Lanes {
  typedef float F __attribute__((vector_size(W * sizeof(float))));
  typedef int32_t I __attribute__((vector_size(W * sizeof(int32_t))));
  typedef uint32_t U __attribute__((vector_size(W * sizeof(uint32_t))));
  typedef uint16_t Half __attribute__((vector_size(W * sizeof(uint16_t))));
};
using F = Lanes<kLanes>::F;
using I = Lanes<kLanes>::I;
using HalfF = Lanes<(kLanes > 8 ? 8 : kLanes)>::F;  // head sizes are multiples of 8

template <class V>
constexpr int kWidth = sizeof(V) / sizeof(float);

template <class V = F>
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V = F>
inline V load(const BFloat16* p) {
#if defined(__AVX512F__)  // of a conversion of vectors g++ makes four instructions
  if constexpr (kWidth<V> == 16)
    return (V)(_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))) << 16);
#endif
  using L = Lanes<kWidth<V>>;
  typename L::Half half;
  std::memcpy(&half, p, sizeof half);
  const typename L::U bits = __builtin_convertvector(half, typename L::U) << 16;
  V v;
  std::memcpy(&v, &bits, sizeof(V));
  return v;
}

// Twice kLanes numbers, those at even places and those at odd ones.
inline void load_pairs(const BFloat16* p, F& even, F& odd) {
  Lanes<kLanes>::U pairs;
  std::memcpy(&pairs, p, sizeof pairs);
  even = bit_cast<F>(pairs << 16);
  odd = bit_cast<F>(pairs & 0xffff0000);
}

template <class V>
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// As to_bfloat16.
template <class V>
inline void store(BFloat16* p, V v) {
  using L = Lanes<kWidth<V>>;
  typename L::U bits;
  std::memcpy(&bits, &v, sizeof(V));
  const typename L::U nearest = bits + 0x7fff + (bits >> 16 & 1);
  bits = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : nearest;
  const typename L::Half half = __builtin_convertvector(bits >> 16, typename L::Half);
  std::memcpy(p, &half, sizeof half);
}

inline I load_ints(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof(I));
  return v;
}

// Bytes as integers.
inline I load_bytes(const void* p) {
#if defined(__AVX512F__)
  return (I)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(static_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
#else
  I v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<const uint8_t*>(p)[i];
  return v;
#endif
}

inline F fill(float x) { return x - F{}; }
inline I fill(int32_t x) { return x - I{}; }

// Operand order matters: when b is NaN the result is b, as MAXPS has it, so NaN is passed on and
// not hidden.
inline F max(F a, F b) {
#if defined(__AVX512F__)  // g++ would compare and blend
  return _mm512_maskz_max_ps(0xffff, a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^x for x below 127; NaN for NaN; below -126, -inf included, at most 2^-126 (callers set what must be 0 to 0).
inline F exp2(F x) {
#if defined(__AVX512F__)
  // Two instructions take the power of two apart and put it back; a result below 2^-126 would be denormal and slow.
  const __m512 t = max(fill(-126.0f), x);
  constexpr __mmask16 kAll = 0xffff;  // the masked forms leave nothing undefined for the compiler to warn about
  const __m512 whole = _mm512_maskz_roundscale_ps(kAll, t, 0);
  return _mm512_maskz_scalef_ps(kAll, exp2_fraction<F>(_mm512_maskz_reduce_ps(kAll, t, 0)), whole);
#else
  x = max(fill(-127.0f), x);
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  F shifted = x + kRound;
  F fraction = x - (shifted - kRound);
  I bits;
  std::memcpy(&bits, &shifted, sizeof(I));
  bits = (bits + 127) << 23;  // the low bits of `shifted` hold the integer; -127 becomes the float 0
  F power;
  std::memcpy(&power, &bits, sizeof(F));
  return exp2_fraction(fraction) * power;
#endif
}

inline F tanh(F x) {
  F size = x < 0.0f ? -x : x;
  F capped = size > 10.0f ? fill(10.0f) : size;  // tanh(10) is 1 in float; a NaN stays
  F tail = 1.0f - 2.0f / (exp2(capped * (2.0f * kLog2E)) + 1.0f);
  F large = x < 0.0f ? -tail : tail;
  return size < 0.625f ? tanh_small(x) : large;
}

// What law.hpp's templates run on.
struct Vector {
  using F = PYQUIET_ISA::F;
  using I = PYQUIET_ISA::I;
  using U = Lanes<kLanes>::U;

  static F fill(float x) { return PYQUIET_ISA::fill(x); }
  static F to_float(I x) { return __builtin_convertvector(x, F); }
  static I truncate(F x) { return __builtin_convertvector(x, I); }
  static F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
    return _mm256_fmadd_ps(a, b, c);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#endif
  }
};

inline bool any_above(F x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, fill(limit), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(x > limit);
#else
  for (int i = 0; i < kLanes; ++i)
    if (x[i] > limit) return true;
  return false;
#endif
}

// exp(x) 2^-base, to 1e-7, as power * fraction: 2^n 2^(j / kLanes) from a table in a register, and the rest by a
// polynomial that is short for that. At least about 2^-125; NaN for NaN. It must be below 2^126, and |base| below 2^19.
struct Exp {
#if defined(__AVX2__)
  static constexpr bool kHasBase = true;
  static constexpr float kRound = 12582912.0f / kLanes;  // 1.5 * 2^23 / kLanes: adding it rounds to 1 / kLanes
  I table;
  F round, low;

  explicit Exp(float base = 0) {
    // The bits of 2^(j / 16), less what j itself adds to them below.
    constexpr int32_t kTable[] = {0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532,
                                  0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c,
                                  0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d};
    for (int j = 0; j < kLanes; ++j) table[j] = kTable[j * (16 / kLanes)];
    set_base(base);
  }

  void set_base(float base) {
    round = fill(kRound - base);
    low = fill((base - 125) * kLn2);
  }

  F power(F x, F& fraction) const {
    x = max(low, x);
    const F shifted = Vector::fma(x, fill(kLog2E), round);
    const F rest = Vector::fma(x, fill(kLog2E), round - shifted);  // round - shifted is exact
    constexpr float kExp2[] = {1.0f, 0.6931471824645996f, 0.24023355543613434f, 0.05550508573651314f};
    fraction = polynomial<Vector>(rest, kExp2);
    const I bits = bit_cast<I>(shifted);
#if defined(__AVX512F__)
    const I entry = (I)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)bits, (__m512i)table);
#else
    const I entry = (I)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)bits);
#endif
    return bit_cast<F>(entry + (bits << (kLanes == 16 ? 19 : 20)));
  }
#else
  static constexpr bool kHasBase = false;  // without fused multiply-add, x and base would have to be small
  F low = fill(-87.0f);

  explicit Exp(float = 0) {}
  void set_base(float) {}

  F power(F x, F& fraction) const {
    fraction = fill(1.0f);
    return exp2(max(low, x) * kLog2E);
  }
#endif

  // 0 where it is near the least, -inf included.
  F operator()(F x) const {
    F fraction;
    const F whole = power(x, fraction);
    return x < low + 1.0f ? F{} : whole * fraction;
  }
};

// Half as many lanes of 64 bits.
typedef uint64_t W __attribute__((vector_size(sizeof(F))));
typedef double D __attribute__((vector_size(sizeof(F))));

// The products of the low halves of 64-bit lanes.
inline W multiply_low(W a, W b) {
#if defined(__AVX512F__)
  return (W)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (W)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// {a, b}[Lane ...], the lanes of b counted on from those of a.
template <int... Lane, class V>
inline V shuffle(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  typedef std::conditional_t<sizeof(V) == sizeof...(Lane) * 8, int64_t, int32_t> T;
  typedef T Index __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Index{Lane...});
#endif
}

// Exchanges the off-diagonal S x S blocks of the 2 S x 2 S blocks that two rows a, b (S apart) have part in.
template <int S, class V, int... Lane>
inline void swap_blocks(V& a, V& b, std::integer_sequence<int, Lane...>) {
  constexpr int W = sizeof...(Lane);
  const V low = shuffle<(Lane & S ? W + Lane - S : Lane)...>(a, b);
  b = shuffle<(Lane & S ? W + Lane : Lane + S)...>(a, b);
  a = low;
}

// Transposes W rows of W lanes.
template <int W, int S = 1>
inline void transpose(typename Lanes<W>::F* row) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & S)) swap_blocks<S>(row[i], row[i + S], std::make_integer_sequence<int, W>{});
  if constexpr (2 * S < W) transpose<W, 2 * S>(row);
}

// The sums of as many rows as they have lanes, floats or doubles, one a lane; the rows are used up.
template <int S = 1, class V>
inline V sum_rows(V* row) {
  constexpr int W = sizeof(V) / sizeof(row[0][0]);
#pragma GCC unroll 16
  for (int i = 0; i < W; i += 2 * S) {
    swap_blocks<S>(row[i], row[i + S], std::make_integer_sequence<int, W>{});
    row[i] += row[i + S];
  }
  if constexpr (2 * S < W) return sum_rows<2 * S>(row);
  return row[0];
}

using F4 = Lanes<4>::F;

// The sum of every quarter of v, lane by lane: 16 or 8 lanes folded to 4.
template <class V>
inline F4 fold(V v) {
  if constexpr (sizeof(V) == sizeof(F4)) {
    return v;
  } else {
    typename Lanes<sizeof(V) / 8>::F halves[2];
    std::memcpy(halves, &v, sizeof(V));
    return fold(halves[0] + halves[1]);
  }
}

// {sum of a, sum of b, sum of c, sum of d}
template <class V>
inline F4 sum4(V a, V b, V c, V d) {
  F4 row[4] = {fold(a), fold(b), fold(c), fold(d)};
  transpose<4>(row);
  return (row[0] + row[2]) + (row[1] + row[3]);
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
