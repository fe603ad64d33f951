// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the
// uniform that pyquiet makes of one block. Counter-based: a number is a function of its address, so
// it does not depend on the batch, the order or the thread that asks for it.
//   key     = (low, high) half of the 64-bit seed
//   counter = (sequence, position, step, purpose << 26 | index)
#pragma once

#include <cstdint>

#include "numerics.hpp"

namespace pyquiet {

struct PhiloxBlock {
  uint32_t word[4];
};

PYQUIET_HD PhiloxBlock philox(uint64_t seed, PhiloxBlock counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53} * c[0], odd = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t c0 = static_cast<uint32_t>(odd >> 32) ^ c[1] ^ key0;
    const uint32_t c2 = static_cast<uint32_t>(even >> 32) ^ c[3] ^ key1;
    c[0] = c0;
    c[1] = static_cast<uint32_t>(odd);
    c[2] = c2;
    c[3] = static_cast<uint32_t>(even);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// ((x >> 12) + 1/2) * 2^-52 with x = word 1 * 2^32 + word 0: exact in double, never 0, never 1.
PYQUIET_HD double uniform(PhiloxBlock block) {
  const uint64_t x = uint64_t{block.word[1]} << 32 | block.word[0];
  return (static_cast<double>(x >> 12) + 0.5) * 0x1p-52;
}

// What numbers are for, where kernels say it themselves: as pyquiet.randomness.Purpose.
enum Purpose : uint32_t { kAccept = 3, kResidual = 4, kBonus = 5, kGumbel = 9 };

// One word of the counter for every row of a call: an int64 a row, or one value for all of them, or the row's number.
struct CounterField {
  const int64_t* rows;  // [R] or none
  int64_t value;        // kRow: the row's number

  static constexpr int64_t kRow = -1;

  PYQUIET_HD int64_t at(int64_t row) const { return rows ? rows[row] : value == kRow ? row : value; }
};

// What a kernel unpacks a Python Stream into. Its owner has checked the ranges: sequence, position
// and step below 2^32, index below 2^26.
struct Stream {
  uint64_t seed;
  uint32_t purpose;
  CounterField sequence, position, step, index;

  PYQUIET_HD PhiloxBlock counter(int64_t row) const {
    return {{static_cast<uint32_t>(sequence.at(row)), static_cast<uint32_t>(position.at(row)),
             static_cast<uint32_t>(step.at(row)), purpose << 26 | static_cast<uint32_t>(index.at(row))}};
  }

  // For another purpose, `offset` positions on. Gumbel noise of token v: block v / 2, its half v % 2.
  PYQUIET_HD PhiloxBlock counter(int64_t row, int64_t offset, Purpose other) const {
    return {{static_cast<uint32_t>(sequence.at(row)), static_cast<uint32_t>(position.at(row) + offset),
             static_cast<uint32_t>(step.at(row)),
             uint32_t{other} << 26 | (other == kGumbel ? 0 : static_cast<uint32_t>(index.at(row)))}};
  }
};

PYQUIET_HD void uniforms(const Stream& stream, double* out, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) out[r] = uniform(philox(stream.seed, stream.counter(r)));
}

}  // namespace pyquiet
