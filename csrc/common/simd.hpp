// Vectors of the instruction set that a file is compiled for, through the compiler's own vector
// types: one source for SSE4, AVX2, AVX-512 and NEON. Everything sits in the namespace of its ISA,
// or the linker might keep the AVX-512 copy of an inline function for all of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "numerics.hpp"

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
};
using F = Lanes<kLanes>::F;
using I = Lanes<kLanes>::I;

template <class V = F>
inline V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(float* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline I load_ints(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof(I));
  return v;
}

inline F fill(float x) { return x - F{}; }
inline I fill(int32_t x) { return x - I{}; }

// Operand order matters: when b is NaN the result is b, as MAXPS has it, so NaN is passed on and
// not hidden.
inline F max(F a, F b) { return a > b ? a : b; }

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

using F4 = Lanes<4>::F;

#if defined(__clang__)
#define PYQUIET_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PYQUIET_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Lanes<4>::I{__VA_ARGS__})
#endif

inline void transpose4(F4& r0, F4& r1, F4& r2, F4& r3) {
  const F4 low01 = PYQUIET_SHUFFLE(r0, r1, 0, 4, 1, 5), high01 = PYQUIET_SHUFFLE(r0, r1, 2, 6, 3, 7);
  const F4 low23 = PYQUIET_SHUFFLE(r2, r3, 0, 4, 1, 5), high23 = PYQUIET_SHUFFLE(r2, r3, 2, 6, 3, 7);
  r0 = PYQUIET_SHUFFLE(low01, low23, 0, 1, 4, 5);
  r1 = PYQUIET_SHUFFLE(low01, low23, 2, 3, 6, 7);
  r2 = PYQUIET_SHUFFLE(high01, high23, 0, 1, 4, 5);
  r3 = PYQUIET_SHUFFLE(high01, high23, 2, 3, 6, 7);
}
#undef PYQUIET_SHUFFLE

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
  F4 r0 = fold(a), r1 = fold(b), r2 = fold(c), r3 = fold(d);
  transpose4(r0, r1, r2, r3);
  return (r0 + r2) + (r1 + r3);
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
