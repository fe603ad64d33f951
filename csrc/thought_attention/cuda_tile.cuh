// What the CUDA kernels of thought attention share: where rows and keys are, tiles in shared memory, and the two matrix
// products on a warp's accumulators. A warp owns 16 rows or a multiple of them; its lane 4 g + c holds columns 2 c and
// 2 c + 1 of every 8 in rows g and g + 8 of every 16 (portable.cuh), for float as well, whose products are plain FMAs.
#pragma once

#include <climits>
#include <cmath>

#include "../common/portable.cuh"
#include "contract.hpp"

namespace pyquiet {

template <class T, int N>
struct Array {
  T* data;
  int64_t stride[N];

  template <class... Index>
  PYQUIET_DEVICE T* at(Index... index) const {
    int64_t offset = 0;
    int dim = 0;
    ((offset += static_cast<int64_t>(index) * stride[dim++]), ...);
    return data + offset;
  }
};

// n / divisor for n < 2^31 by a multiplication.
struct Divisor {
  uint32_t divisor, factor, shift;

  PYQUIET_DEVICE uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

// lo <= key < lo + count, in one comparison.
struct Interval {
  int32_t lo;
  uint32_t count;

  PYQUIET_DEVICE bool has(int32_t key) const { return static_cast<uint32_t>(key) - static_cast<uint32_t>(lo) < count; }
};

PYQUIET_DEVICE Interval interval(int64_t lo, int64_t end) {
  return lo < end ? Interval{static_cast<int32_t>(lo), static_cast<uint32_t>(end - lo)} : Interval{0, 0};
}

PYQUIET_DEVICE bool overlap(Interval a, int32_t lo, int32_t end) {
  return a.count != 0 && a.lo < end && a.lo + static_cast<int32_t>(a.count) > lo;
}

// What both passes are given. Rows of one (b, g) are counted steps fastest, then heads of the group, then positions;
// the keys of all its paths are one array of T * P.
template <class E>
struct Inputs {
  Array<const E, 5> query;
  Array<const E, 4> text_key, text_value;
  Array<const E, 5> path_key, path_value;
  Array<const int64_t, 2> text_limits;
  Array<const int64_t, 1> text_start;
  int64_t heads, rows, path_keys;  // B * G, T * group * Q, T * P
  int32_t G, S, group, Q, P, D;
  Divisor by_step, by_row, by_path;  // Q, group * Q, P
  int64_t window;
  float factor, cap;  // base-2 score = q.k * factor, or cap * tanh(q.k * factor)
  bool vectors;       // every row of every tensor is 16-byte aligned

  PYQUIET_DEVICE int64_t rows_per_position() const { return by_row.divisor; }
};

// A tile of rows: row 0 is row `first` of `position`.
struct RowTile {
  int64_t position;
  int32_t first, rows;
};

struct RowPlace {
  int64_t position;
  int32_t head, step;  // the head in its group
};

template <class E>
PYQUIET_DEVICE RowTile row_tile(const Inputs<E>& p, int64_t begin, int64_t end, int size) {
  const int64_t position = begin / p.rows_per_position();
  const int64_t rows = end - begin < size ? end - begin : size;
  return {position, static_cast<int32_t>(begin - position * p.rows_per_position()), static_cast<int32_t>(rows)};
}

template <class E>
PYQUIET_DEVICE RowPlace place(const Inputs<E>& p, const RowTile& tile, int row) {
  const uint32_t flat = tile.first + row, position = p.by_row.quotient(flat);
  const uint32_t in_position = flat - position * p.by_row.divisor, head = p.by_step.quotient(in_position);
  return {tile.position + position, static_cast<int32_t>(head), static_cast<int32_t>(in_position - head * p.Q)};
}

// The limit of a position, or -1 where it or the batch's start is out of 0 .. S.
template <class E>
PYQUIET_DEVICE int64_t checked_limit(const Inputs<E>& p, int64_t b, int64_t position, int64_t* start) {
  const int64_t limit = *p.text_limits.at(b, position);
  *start = p.text_start.data ? *p.text_start.at(b) : 0;
  return limit < 0 || limit > p.S || *start < 0 || *start > p.S ? -1 : limit;
}

template <class E>
PYQUIET_DEVICE Interval text_interval(const Inputs<E>& p, int64_t limit, int64_t start, int step) {
  const int64_t left = p.window > 0 ? limit + p.P - p.Q + step - p.window + 1 : 0;
  return interval(left > start ? left : start, limit);
}

// Among the keys of the row's own path.
template <class E>
PYQUIET_DEVICE Interval own_interval(const Inputs<E>& p, int step) {
  const int64_t end = static_cast<int64_t>(p.P) - p.Q + step + 1, left = end - p.window;
  return interval(p.window > 0 && left > 0 ? left : 0, end);
}

PYQUIET_DEVICE int lane_index() { return threadIdx.x % 32; }
PYQUIET_DEVICE int warp_index() { return threadIdx.x / 32; }

// The smallest interval that holds `size` others, computed by every warp alike.
PYQUIET_DEVICE Interval hull(const Interval* of, int size) {
  int32_t lo = INT32_MAX, end = 0;
  for (int i = lane_index(); i < size; i += 32) {
    if (of[i].count == 0) continue;
    lo = of[i].lo < lo ? of[i].lo : lo;
    const int32_t to = of[i].lo + static_cast<int32_t>(of[i].count);
    end = to > end ? to : end;
  }
  lo = __reduce_min_sync(0xffffffff, lo);
  end = __reduce_max_sync(0xffffffff, end);
  return interval(lo, end);
}

// A kernel's tiles: kM rows stay while tiles of kN of the other side stream past, two buffers deep. Rows in shared
// memory are kStride apart, so that eight of them at one column lie in different banks. The registers are to suffice
// for kBlocks blocks on a multiprocessor.
template <class Element, int D, int Warps, int TilesM, int N, int Blocks>
struct Shape {
  using E = Element;
  static constexpr int kD = D, kWarps = Warps, kThreads = 32 * Warps, kTilesM = TilesM, kRowsPerWarp = 16 * TilesM;
  static constexpr int kBlocks = Blocks;
  static constexpr int kM = kRowsPerWarp * Warps, kN = N, kTilesN = N / 8, kTilesD = D / 8;
  static constexpr int kVector = 16 / sizeof(E), kStride = D + kVector;
};

// Products run over 32 columns of the head at a time: columns from D up to the next multiple of it are zeros.
constexpr int kColumns = 32;

// Starts copying `rows` rows of D elements, zeros after them, to kRows rows of a tile; complete, for this thread's
// part, after wait_copies().
template <class C, int kRows, class PointerOf>
PYQUIET_DEVICE void load_rows(typename C::E* tile, int rows, const Inputs<typename C::E>& p, PointerOf pointer_of) {
  using E = typename C::E;
  constexpr int kChunks = C::kD / C::kVector;  // of 16 bytes in a row
  static_assert(C::kThreads % kChunks == 0, "every thread keeps its column");
  const int d = threadIdx.x % kChunks * C::kVector;
  if (d >= (p.D + kColumns - 1) / kColumns * kColumns) return;
  for (int row = threadIdx.x / kChunks; row < kRows; row += C::kThreads / kChunks) {
    const bool valid = row < rows && d < p.D;
    const E* from = valid ? pointer_of(row) + d : p.query.data;
    E* to = tile + row * C::kStride + d;
    if (p.vectors) {
      copy_async(reinterpret_cast<Bytes16*>(to), from, valid);
    } else {
      for (int i = 0; i < C::kVector; ++i) to[i] = valid ? from[i] : E{};
    }
  }
}

template <class E>
PYQUIET_DEVICE void put_pair(E* to, float low, float high) {
  if constexpr (sizeof(E) == 4) {
    to[0] = low;
    to[1] = high;
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack<E>(low, high);
  }
}

// Writes a warp's accumulators, as E, to its first `rows` rows at pointer_of(row), by way of its own rows of a tile
// that no other warp reads.
template <class C, class PointerOf>
PYQUIET_DEVICE void store_rows(const float (&acc)[C::kTilesM][C::kTilesD][4], typename C::E* tile, int rows,
                               const Inputs<typename C::E>& p, PointerOf pointer_of) {
  using E = typename C::E;
  const int lane = lane_index();
  __syncwarp();  // other lanes may still read the rows that stood here
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < C::kTilesD; ++n) {
      E* to = tile + (16 * m + lane / 4) * C::kStride + 8 * n + lane % 4 * 2;
      put_pair(to, acc[m][n][0], acc[m][n][1]);
      put_pair(to + 8 * C::kStride, acc[m][n][2], acc[m][n][3]);
    }
  __syncwarp();
  constexpr int kChunks = C::kD / C::kVector;
  for (int i = lane; i < C::kRowsPerWarp * kChunks; i += 32) {
    const int row = i / kChunks, d = i % kChunks * C::kVector;
    if (row >= rows || d >= p.D) continue;
    const E* from = tile + row * C::kStride + d;
    E* to = pointer_of(row) + d;
    if (p.vectors) {
      *reinterpret_cast<Bytes16*>(to) = *reinterpret_cast<const Bytes16*>(from);
    } else {
      for (int j = 0; j < C::kVector; ++j) to[j] = from[j];
    }
  }
}

// acc[row][column] += a[row] . b[column] over D, for a warp's rows of tile a and those 16 columns (rows of tile b)
// whose bit is set in `steps`.
template <class C>
PYQUIET_DEVICE void multiply_rows(float (&acc)[C::kTilesM][C::kTilesN][4], const typename C::E* a,
                                  const typename C::E* b, int D, uint32_t steps) {
  using E = typename C::E;
  const int lane = lane_index();
  if constexpr (sizeof(E) == 2) {
    a += lane % 16 * C::kStride + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * C::kStride + lane / 8 % 2 * 8;
    for (int d = 0; d < D; d += kColumns) {
      uint32_t left[C::kTilesM][2][4];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
        for (int k = 0; k < 2; ++k) load_matrices(left[m][k], a + 16 * m * C::kStride + d + 16 * k);
#pragma unroll
      for (int n = 0; n < C::kTilesN; n += 2) {
        if (!(steps >> n / 2 & 1)) continue;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t right[4];
          load_matrices(right, b + 8 * n * C::kStride + d + 16 * k);
#pragma unroll
          for (int m = 0; m < C::kTilesM; ++m) {
            multiply_add<E>(acc[m][n], left[m][k], right[0], right[1]);
            multiply_add<E>(acc[m][n + 1], left[m][k], right[2], right[3]);
          }
        }
      }
    }
  } else {
    a += lane / 4 * C::kStride;
    b += lane % 4 * 2 * C::kStride;
    for (int d = 0; d < D; d += 4) {
      float4 left[C::kTilesM][2];
#pragma unroll
      for (int m = 0; m < 2 * C::kTilesM; ++m)
        left[m / 2][m % 2] = *reinterpret_cast<const float4*>(a + 8 * m * C::kStride + d);
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n) {
        if (!(steps >> n / 2 & 1)) continue;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 right = *reinterpret_cast<const float4*>(b + (8 * n + j) * C::kStride + d);
#pragma unroll
          for (int m = 0; m < 2 * C::kTilesM; ++m) {
            const float4 x = left[m / 2][m % 2];
            float& sum = acc[m / 2][n][m % 2 * 2 + j];
            sum = fmaf(x.w, right.w, fmaf(x.z, right.z, fmaf(x.y, right.y, fmaf(x.x, right.x, sum))));
          }
        }
      }
    }
  }
}

// acc[row] += sum over columns of weight[row][column] * values[column], for those 16 columns (rows of tile `values`)
// whose bit is set in `steps`. The weights are rounded to E here and nowhere else.
template <class C>
PYQUIET_DEVICE void multiply_weights(float (&acc)[C::kTilesM][C::kTilesD][4],
                                     const float (&weight)[C::kTilesM][C::kTilesN][4], const typename C::E* values,
                                     int D, uint32_t steps) {
  using E = typename C::E;
  const int lane = lane_index();
  if constexpr (sizeof(E) == 2) {
    values += lane % 16 * C::kStride + lane / 16 * 8;
#pragma unroll
    for (int n = 0; n < C::kTilesN; n += 2) {
      if (!(steps >> n / 2 & 1)) continue;
      uint32_t left[C::kTilesM][4];
#pragma unroll
      for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          left[m][i] = pack<E>(weight[m][n + i / 2][i % 2 * 2], weight[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int d = 0; d < C::kTilesD; d += 2) {
        if (8 * d % kColumns == 0 && 8 * d >= D) break;
        uint32_t right[4];
        load_matrices_transposed(right, values + 8 * n * C::kStride + 8 * d);
#pragma unroll
        for (int m = 0; m < C::kTilesM; ++m) {
          multiply_add<E>(acc[m][d], left[m], right[0], right[1]);
          multiply_add<E>(acc[m][d + 1], left[m], right[2], right[3]);
        }
      }
    }
  } else {
    values += lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n) {
      if (!(steps >> n / 2 & 1)) continue;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        float left[2 * C::kTilesM];  // the weight of column 8 n + k, from the lane of this row that holds it
#pragma unroll
        for (int m = 0; m < 2 * C::kTilesM; ++m)
          left[m] = __shfl_sync(0xffffffff, weight[m / 2][n][m % 2 * 2 + k % 2], (lane & ~3) + k / 2);
#pragma unroll
        for (int d = 0; d < C::kTilesD; ++d) {
          if (8 * d % kColumns == 0 && 8 * d >= D) break;
          const float2 right = *reinterpret_cast<const float2*>(values + (8 * n + k) * C::kStride + 8 * d);
#pragma unroll
          for (int m = 0; m < 2 * C::kTilesM; ++m) {
            acc[m / 2][d][m % 2 * 2] = fmaf(left[m], right.x, acc[m / 2][d][m % 2 * 2]);
            acc[m / 2][d][m % 2 * 2 + 1] = fmaf(left[m], right.y, acc[m / 2][d][m % 2 * 2 + 1]);
          }
        }
      }
    }
  }
}

// tanh to a few units in the last place of float; NaN stays NaN.
PYQUIET_DEVICE float capped_tanh(float x) {
  const float size = fabsf(x);
  if (size < 0.625f) return tanh_small(x);
  const float power = exp2_approximate((size > 10.0f ? 10.0f : size) * (2.0f * kLog2E));
  return copysignf(1.0f - 2.0f * reciprocal_approximate(power + 1.0f), x);
}

// The keys that a tile of query rows may see, as one sequence of blocks of kN. First come those of the own paths of its
// positions, counted from key 0 of the first one: they are known before any limit has been read, so that their copies
// start at once. Then come those of the text.
template <class C>
struct KeyBlocks {
  using E = typename C::E;
  const Inputs<E>& p;
  int64_t b, g;
  RowTile tile;
  Interval text;  // what any row sees
  int32_t own_keys;
  int own_blocks, blocks;

  PYQUIET_DEVICE KeyBlocks(const Inputs<E>& p, int64_t b, int64_t g, const RowTile& tile)
      : p(p), b(b), g(g), tile(tile), text{0, 0} {
    own_keys = static_cast<int32_t>(place(p, tile, tile.rows - 1).position - tile.position + 1) * p.P;
    blocks = own_blocks = (own_keys + C::kN - 1) / C::kN;
  }

  PYQUIET_DEVICE void add_text(const Interval* of_rows) {
    text = hull(of_rows, C::kM);
    blocks = own_blocks + (text.count + C::kN - 1) / C::kN;
  }

  PYQUIET_DEVICE bool is_own(int block) const { return block < own_blocks; }
  PYQUIET_DEVICE int32_t first_key(int block) const {
    return is_own(block) ? block * C::kN : text.lo + (block - own_blocks) * C::kN;
  }

  // The keys and values of a block, as two tiles.
  PYQUIET_DEVICE void load(int block, E* to) const {
    const int32_t first = first_key(block);
    E* to_value = to + C::kN * C::kStride;
    if (is_own(block)) {
      load_rows<C, C::kN>(to, own_keys - first, p, [&](int i) { return own_row(p.path_key, first + i); });
      load_rows<C, C::kN>(to_value, own_keys - first, p, [&](int i) { return own_row(p.path_value, first + i); });
    } else {
      const int32_t left = text.lo + static_cast<int32_t>(text.count) - first;
      load_rows<C, C::kN>(to, left, p, [&](int i) { return p.text_key.at(b, g, first + i); });
      load_rows<C, C::kN>(to_value, left, p, [&](int i) { return p.text_value.at(b, g, first + i); });
    }
  }

  PYQUIET_DEVICE const E* own_row(const Array<const E, 5>& of, uint32_t key) const {
    const uint32_t position = p.by_path.quotient(key);
    return of.at(b, g, tile.position + position, key - position * p.P);
  }
};

// One bit for each 16 of a block's kN keys, from `first` on, of which a warp's rows see any.
template <class C>
PYQUIET_DEVICE uint32_t steps_seen(Interval seen, int32_t first) {
  if (!overlap(seen, first, first + C::kN)) return 0;
  const int32_t lo = seen.lo - first, end = lo + static_cast<int32_t>(seen.count);
  const int from = lo > 0 ? lo / 16 : 0, to = end < C::kN ? (end + 15) / 16 : C::kN / 16;
  return (1u << to) - (1u << from);
}

}  // namespace pyquiet
