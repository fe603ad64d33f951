// Arithmetic that every kernel shares, written once for scalars on host and device and for SIMD
// vectors: F is float or a vector of floats, and only + - * and the three primitives below touch
// it.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define PYQUIET_HD __host__ __device__ inline
#else
#define PYQUIET_HD inline
#endif

namespace pyquiet {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// 2^f on [-1/2, 1/2], relative error 1.9e-9 before rounding (minimax fit of degree 6).
template <class F>
PYQUIET_HD F exp2_fraction(F f) {
  F p = f * 0.0001534581242594868f + 0.0013399930903688073f;
  p = p * f + 0.009618489071726799f;
  p = p * f + 0.05550328642129898f;
  p = p * f + 0.24022646248340607f;
  p = p * f + 0.6931471824645996f;
  return p * f + 1.0f;
}

// tanh(x) - x = x * x^2 * poly(x^2) for |x| <= 0.625, where 1 - 2 / (e^2x + 1) would cancel.
template <class F>
PYQUIET_HD F tanh_small(F x) {
  F z = x * x;
  F p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  return p * z * x + x;
}

}  // namespace pyquiet
