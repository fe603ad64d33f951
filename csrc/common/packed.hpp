// Products of small matrices of bfloat16 in packed form, summed in float, for the instruction sets that have them:
// tiles of 16 x 16 (AMX) or dot products of pairs (AVX512-BF16). Both take denormal numbers for 0.
//
// Tried and left out: a float matrix as the sum of three bfloat16 ones, six products of tiles each. The tiles have the
// rate for it, but under that load the clock falls, and with the splitting nothing is won over float multiply-adds.
#pragma once

#include <algorithm>

#include "gemm.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Whether matrices of E are multiplied in packed form.
template <class E>
constexpr bool kPacked = sizeof(E) == 2 && kHasPairs;

// What the depth of a product is rounded up to, with zeros.
constexpr int kDepth = kHasTiles ? 32 : 2;

// Left: [m][k], right: [k / 2][n][2]; the stride counts elements between rows, or pairs of rows.
struct Packed {
  uint16_t* data;
  int64_t stride;
};

using U = Lanes<kLanes>::U;
using Half = Lanes<kLanes>::Half;

#if defined(__AVX512BF16__)

// x rounded to bfloat16, to nearest, ties to even; a denormal number becomes 0, as it would in the product.
inline Half to_half(F x) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  Half bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

// Lane by lane `even` in the lower half of a word, `odd` in the upper one.
inline U to_pairs(F even, F odd) {
  alignas(64) static constexpr uint16_t kOrder[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (U)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder),
                                     (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}

// Left matrix of rows of floats, `vectors` vectors long.
inline void pack_left(const float* from, int64_t stride, int64_t rows, int vectors, const Packed& to) {
  for (int64_t m = 0; m < rows; ++m)
    for (int v = 0; v < vectors; ++v) {
      const Half half = to_half(load(from + m * stride + v * kLanes));
      std::memcpy(to.data + m * to.stride + v * kLanes, &half, sizeof half);
    }
}

// Right matrix of rows of floats, `vectors` vectors long; rows from `depth` to `padded`, an even number, are 0.
inline void pack_right(const float* from, int64_t stride, int64_t depth, int64_t padded, int vectors,
                       const Packed& to) {
  for (int64_t k = 0; k < padded; k += 2)
    for (int v = 0; v < vectors; ++v) {
      const float* row = from + k * stride + v * kLanes;
      const U pair = to_pairs(k < depth ? load(row) : F{}, k + 1 < depth ? load(row + stride) : F{});
      std::memcpy(to.data + k / 2 * to.stride + v * 2 * kLanes, &pair, sizeof pair);
    }
}

#else  // never called: see kPacked

inline U to_pairs(F, F) { return U{}; }
inline void pack_left(const float*, int64_t, int64_t, int, const Packed&) {}
inline void pack_right(const float*, int64_t, int64_t, int64_t, int, const Packed&) {}

#endif

#if defined(__AMX_BF16__)

// The compiler's tile instructions do not say what memory they read: stores before this come first.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Opens the tiles for this thread, all of 16 rows of 64 bytes.
struct TileUse {
  TileUse() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    finish_stores();
    _tile_loadconfig(config);
  }
  ~TileUse() { _tile_release(); }
};

// 16 M rows by 16 N columns of c. Tiles 0 to 3 are sums, 4 and 5 of the left, 6 and 7 of the right matrix.
template <int M, int N, bool kAdd>
void packed_block(const Packed& left, const Packed& right, float* c, int64_t c_stride, int64_t depth) {
  const int64_t c_bytes = c_stride * sizeof(float), left_bytes = 2 * left.stride, right_bytes = 2 * right.stride;
  finish_stores();
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if (N > 1) _tile_loadd(1, c + 16, c_bytes);
    if (M > 1) _tile_loadd(2, c + 16 * c_stride, c_bytes);
    if (M > 1 && N > 1) _tile_loadd(3, c + 16 * c_stride + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    const uint16_t *a = left.data + k, *b = right.data + k / 2 * right.stride;
    _tile_loadd(4, a, left_bytes);
    _tile_loadd(6, b, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (N > 1) _tile_loadd(7, b + 32, right_bytes);
    if (N > 1) _tile_dpbf16ps(1, 4, 7);
    if (M > 1) _tile_loadd(5, a + 16 * left.stride, left_bytes);
    if (M > 1) _tile_dpbf16ps(2, 5, 6);
    if (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  if (N > 1) _tile_stored(1, c + 16, c_bytes);
  if (M > 1) _tile_stored(2, c + 16 * c_stride, c_bytes);
  if (M > 1 && N > 1) _tile_stored(3, c + 16 * c_stride + 16, c_bytes);
}
// c[m][n] = start + sum_k left[m][k] right[k][n]; m and n are rounded up to 16, depth is a multiple of kDepth.
// `between` is called before each handful of rows.
template <Start kStart, class Between>
void packed_gemm(int64_t m, int64_t n, int64_t depth, Packed left, const Packed& right, float* c, int64_t c_stride,
                 const float* rescale, Between between) {
  constexpr bool kAdd = kStart != Start::zero;
  if constexpr (kStart == Start::rescale)
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; j += kLanes)
        store(c + i * c_stride + j, load(c + i * c_stride + j) * load(rescale + j));
  for (; m > 0; m -= 32) {
    between();
    Packed at = right;
    float* to = c;
    for (int64_t columns = n; columns > 0; columns -= 32) {
      const bool two_rows = m > 16, two_columns = columns > 16;
      if (two_rows && two_columns) packed_block<2, 2, kAdd>(left, at, to, c_stride, depth);
      if (two_rows && !two_columns) packed_block<2, 1, kAdd>(left, at, to, c_stride, depth);
      if (!two_rows && two_columns) packed_block<1, 2, kAdd>(left, at, to, c_stride, depth);
      if (!two_rows && !two_columns) packed_block<1, 1, kAdd>(left, at, to, c_stride, depth);
      at.data += 64;
      to += 32;
    }
    left.data += 32 * left.stride;
    c += 32 * c_stride;
  }
}

#elif defined(__AVX512BF16__)

struct TileUse {};

// 8 rows by 16 N columns of c.
template <int N, Start kStart>
void packed_block(const Packed& left, const Packed& right, float* c, int64_t c_stride, int64_t depth,
                  const float* rescale) {
  __m512 sum[8][N] = {};
  if constexpr (kStart != Start::zero) {
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        sum[m][n] = _mm512_loadu_ps(c + m * c_stride + n * 16);
        if constexpr (kStart == Start::rescale) sum[m][n] *= (__m512)load(rescale + n * 16);
      }
  }
  const int64_t stride = left.stride;
  const uint16_t *a = left.data, *a3 = a + 3 * stride, *a6 = a + 6 * stride;  // as in gemm_block
  const uint16_t* b = right.data;
  for (int64_t k = 0; k < depth; k += 2, b += right.stride) {
    __m512bh row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = (__m512bh)_mm512_loadu_si512(b + n * 32);
#pragma GCC unroll 8
    for (int m = 0; m < 8; ++m) {
      int32_t pair;
      std::memcpy(&pair, (m < 3 ? a : m < 6 ? a3 : a6) + (m % 3) * stride + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[m][n] = _mm512_dpbf16_ps(sum[m][n], x, row[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < 8; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_stride + n * 16, sum[m][n]);
}

// The same.
template <Start kStart, class Between>
void packed_gemm(int64_t m, int64_t n, int64_t depth, Packed left, const Packed& right, float* c, int64_t c_stride,
                 const float* rescale, Between between) {
  for (; m > 0; m -= 8, left.data += 8 * left.stride, c += 8 * c_stride) {
    between();
    int64_t from = 0;
    const auto columns = [&](auto vectors) {
      constexpr int N = decltype(vectors)::value;
      packed_block<N, kStart>(left, {right.data + 2 * from, right.stride}, c + from, c_stride, depth, rescale + from);
      from += 16 * N;
    };
    for (int64_t vectors = (n + 15) / 16; vectors > 0; vectors = (n + 15 - from) / 16) {
      if (vectors == 3 || vectors > 4) {
        columns(std::integral_constant<int, 3>{});
      } else if (vectors == 1) {
        columns(std::integral_constant<int, 1>{});
      } else {
        columns(std::integral_constant<int, 2>{});
      }
    }
  }
}

#else

struct TileUse {};

template <Start kStart, class Between>
void packed_gemm(int64_t, int64_t, int64_t, Packed, const Packed&, float*, int64_t, const float*, Between) {}

#endif

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
