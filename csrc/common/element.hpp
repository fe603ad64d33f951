// The 16-bit element types, as bits, and their conversions: storage only, arithmetic is in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "numerics.hpp"

namespace pyquiet {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

PYQUIET_HD float to_float(float x) { return x; }

PYQUIET_HD float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

// Rounds to nearest, ties to even; NaN stays NaN.
PYQUIET_HD BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

}  // namespace pyquiet
