// Products of small matrices in registers, for one instruction set:
//   c[m][n] = start + sum_k a(m, k) b[k][n]
// where the lanes of a vector are n. An element of a is broadcast, so a may lie in memory by rows or by columns; b and
// c are rows of whole vectors. 8 rows by 3 vectors fill 32 registers (24 sums, 3 of b, broadcasts), 4 by 3 fill 16.
#pragma once

#include <algorithm>

#include "simd.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

constexpr int kGemmRows = kRegisters == 32 ? 8 : 4;
constexpr int kGemmVectors = 3;
constexpr int kBetween = 16;  // steps of depth between two calls of `between`: short, so that what it asks for overlaps

// What the sums start from: nothing, c, or c with its column n multiplied by rescale[n].
enum class Start { zero, add, rescale };

// Where a(m, k) lies: `rows`: a[m * stride + k]; `columns`: a[k * stride + m].
enum class Layout { rows, columns };

struct GemmOperands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t depth;
  const float* rescale = nullptr;
};

// M rows by N vectors. The loops over depth are nested: a processor foresees the end of a short loop, not of a long
// one.
template <int M, int N, Start kStart, Layout kLayout, class Between>
void gemm_block(const GemmOperands& o, const float* a, const float* b, float* c, const float* rescale,
                Between between) {
  F sum[M][N] = {};
  if constexpr (kStart != Start::zero) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[m][n] = load(c + m * o.c_stride + n * kLanes);
        if constexpr (kStart == Start::rescale) sum[m][n] *= load(rescale + n * kLanes);
      }
  }
  const int64_t stride = o.a_stride;
  const float *a3 = a + 3 * stride, *a6 = a + 6 * stride;  // three bases: x86 can add 0, 1 or 2 strides
  int64_t k = 0;
  const auto steps = [&](int64_t count) __attribute__((always_inline)) {
    between();
    for (const int64_t end = k + count; k < end; ++k, b += o.b_stride) {
      F row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* base = m < 3 ? a : m < 6 ? a3 : a6;
        const F x = fill(kLayout == Layout::rows ? base[k + (m % 3) * stride] : a[m]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] += x * row[n];
      }
      if constexpr (kLayout == Layout::columns) a += stride;
    }
  };
  while (k + kBetween <= o.depth) steps(kBetween);
  if (k < o.depth) steps(o.depth - k);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * o.c_stride + n * kLanes, sum[m][n]);
}

// Inlined by force: a call, and a copy of its operands, every few blocks would cost a twentieth of the whole.
template <int M, Start kStart, Layout kLayout, class Between>
__attribute__((always_inline)) inline void gemm_rows(int vectors, const GemmOperands& o, const float* a, float* c,
                                                     Between between) {
  const float *b = o.b, *rescale = o.rescale;
  const auto block = [&](auto count) {
    constexpr int N = decltype(count)::value;
    gemm_block<M, N, kStart, kLayout>(o, a, b, c, rescale, between);
    b += N * kLanes;
    c += N * kLanes;
    if (kStart == Start::rescale) rescale += N * kLanes;
    vectors -= N;
  };
  while (vectors > 0) {
    // Four vectors go as two and two: one alone would wait for its broadcasts.
    if (vectors == 3 || vectors > 4) {
      block(std::integral_constant<int, kGemmVectors>{});
    } else if (vectors == 1) {
      block(std::integral_constant<int, 1>{});
    } else {
      block(std::integral_constant<int, 2>{});
    }
  }
}

// `rows` rows of c, `vectors` vectors wide. `between` is called every kBetween steps of each block.
template <Start kStart, Layout kLayout, class Between>
void gemm(int64_t rows, int vectors, const GemmOperands& o, Between between) {
  const float* a = o.a;
  float* c = o.c;
  const auto advance = [&](int m) {
    rows -= m;
    a += kLayout == Layout::rows ? m * o.a_stride : m;
    c += m * o.c_stride;
  };
  for (; rows >= kGemmRows; advance(kGemmRows)) gemm_rows<kGemmRows, kStart, kLayout>(vectors, o, a, c, between);
  if (kGemmRows > 4 && rows >= 4) {
    gemm_rows<4, kStart, kLayout>(vectors, o, a, c, between);
    advance(4);
  }
  for (; rows > 0; advance(1)) gemm_rows<1, kStart, kLayout>(vectors, o, a, c, between);
}

template <Start kStart, Layout kLayout>
void gemm(int64_t rows, int vectors, const GemmOperands& o) {
  gemm<kStart, kLayout>(rows, vectors, o, [] {});
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
