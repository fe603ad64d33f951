// What kernels that read rows of logits share: the chunks that rows are cut in and how a block reads one, folds over a
// warp and a block, and the search in a cumulative sum.
#pragma once

#include "law.hpp"
#include "portable.cuh"

namespace pyquiet {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kEach = 16;                 // elements a thread holds
constexpr int kChunk = kThreads * kEach;  // of a row; no sum depends on how rows are aligned or how many there are
constexpr unsigned kAll = 0xffffffff;
constexpr float kInf = -kNegInf;
template <class W>
constexpr W kMost = std::numeric_limits<W>::max();

// Order of floats as order of unsigned integers; -0 below 0.
PYQUIET_DEVICE uint32_t ordered(float x) {
  const auto bits = bit_cast<uint32_t>(x);
  return bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}
PYQUIET_DEVICE float unordered(uint32_t x) { return bit_cast<float>(x ^ (x >> 31 ? 0x80000000 : 0xffffffff)); }

// Rises with the value; of equal ones the lowest id is largest.
PYQUIET_DEVICE uint64_t ranked(float value, int id) {
  return uint64_t{ordered(value + 0.0f)} << 32 | ~static_cast<uint32_t>(id);  // -0 is 0
}
PYQUIET_DEVICE int id_of(uint64_t best) { return static_cast<int>(~static_cast<uint32_t>(best)); }
PYQUIET_DEVICE float value_of(uint64_t best) { return unordered(static_cast<uint32_t>(best >> 32)); }

// NaN and +inf, neither of which a row may hold, as +inf.
PYQUIET_DEVICE float fault_as_inf(float score) { return score < kInf ? score : kInf; }

PYQUIET_DEVICE float exp_approximate(float x) { return exp2_approximate(x * kLog2E); }

struct Add {
  template <class T>
  PYQUIET_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Either {
  PYQUIET_DEVICE int operator()(int a, int b) const { return a | b; }
};
struct Largest {
  template <class T>
  PYQUIET_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// The same in every lane.
template <class T, class Fold>
PYQUIET_DEVICE T fold_warp(T x, Fold fold) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) x = fold(x, __shfl_xor_sync(kAll, x, i));
  return x;
}

// The same in every thread of the block; `parts` has one place a warp and is used for nothing else.
template <int Warps, class T, class Fold>
PYQUIET_DEVICE T fold_block(T x, Fold fold, T* parts) {
  x = fold_warp(x, fold);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  x = parts[0];
#pragma unroll
  for (int i = 1; i < Warps; ++i) x = fold(x, parts[i]);
  return x;
}

// By a whole warp: the first of n weights at which the cumulative sum exceeds `left`, the sum before it then taken from
// `left`. If rounding lets none, the last that is positive, and `left` is above all that follows.
template <class W, class Weight>
PYQUIET_DEVICE int pick(int n, W& left, Weight weight) {
  const int lane = threadIdx.x % 32;
  int last = 0;
  for (int first = 0; first < n; first += 32) {
    const W own = first + lane < n ? weight(first + lane) : W{0};
    W sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const W before = __shfl_up_sync(kAll, sum, i);
      if (lane >= i) sum += before;
    }
    if (const unsigned above = __ballot_sync(kAll, own > W{0} && sum > left)) {
      const int found = __ffs(above) - 1;
      left -= __shfl_sync(kAll, sum - own, found);
      return first + found;
    }
    if (const unsigned positive = __ballot_sync(kAll, own > W{0})) last = first + 31 - __clz(positive);
    left -= __shfl_sync(kAll, sum, 31);
  }
  left = kMost<W>;
  return last;
}

template <class E>
constexpr int kStagedBytes = (kChunk + 16 / sizeof(E)) * sizeof(E);

// Where in `memory` elements first .. first + count - 1 of a row stand once the caller has waited for its copies and
// the block for each other. Copies are of 16 bytes where these are aligned, which rows of odd V rarely begin with.
template <class E>
PYQUIET_DEVICE const E* stage(const E* row, int first, int count, char* memory) {
  constexpr int kVector = 16 / sizeof(E);
  const E* from = row + first;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(E));
  E* to = reinterpret_cast<E*>(memory) + shift;
  for (int i = static_cast<int>(threadIdx.x) * kVector - shift; i < count; i += kThreads * kVector) {
    if (i >= 0 && i + kVector <= count) {
      copy_async(reinterpret_cast<Bytes16*>(to + i), from + i, true);
    } else {
      for (int e = i < 0 ? 0 : i; e < i + kVector && e < count; ++e) to[e] = from[e];
    }
  }
  return to;
}

PYQUIET_DEVICE int chunk_size(int first, int V) { return V - first < kChunk ? V - first : kChunk; }

}  // namespace pyquiet
