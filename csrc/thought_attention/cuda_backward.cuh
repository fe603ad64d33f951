// The backward kernels of thought attention. Weights are recomputed from the saved lse; with them, and products with
// d_out for the gradients of the weights, each kernel multiplies once more for every gradient it owns:
//   prepare_kernel         RowState of every row, and the text keys that every kRangeRows rows see
//   query_gradient_kernel  one block a tile of kM query rows, keys streaming past: d_query
//   key_gradient_kernel    one block a tile of kM keys, of the text or of paths, the rows that see them streaming past:
//                          d_key and d_value
// Scores and their gradients are so made twice, which costs 7 products for 5, but every sum has one owner and one
// order: no atomics, the same bits in every run, and no limit on the size of a position or a path.
#pragma once

#include "cuda_tile.cuh"

namespace pyquiet {

struct alignas(16) RowState {
  float lse;    // base 2
  float delta;  // out . d_out
  Interval seen;
};

constexpr int kRangeRows = 64;

template <class E>
struct Backward {
  Inputs<E> in;
  Array<const E, 5> out, d_out;
  Array<const float, 4> lse;
  Array<E, 5> d_query;
  Array<E, 4> d_text_key, d_text_value;
  Array<E, 5> d_path_key, d_path_value;
  RowState* rows;    // [B, G, rows], `seen` of the text
  Interval* ranges;  // [B, range_tiles]
  float scale;
  int64_t range_tiles, tiles;                   // tiles: of query_gradient_kernel in a (b, g)
  int64_t text_blocks, own_blocks, own_stride;  // of key_gradient_kernel; own_stride: keys from one to the next
};

// This lane's part of x . y.
template <class E>
PYQUIET_DEVICE float dot_part(const E* x, const E* y, const Inputs<E>& p, int part, int parts) {
  constexpr int kVector = 16 / sizeof(E);
  float sum = 0.0f;
  for (int d = part * kVector; d < p.D; d += parts * kVector) {
    E xs[kVector], ys[kVector];
    if (p.vectors) {
      const Bytes16 x16 = *reinterpret_cast<const Bytes16*>(x + d), y16 = *reinterpret_cast<const Bytes16*>(y + d);
      memcpy(xs, &x16, 16);
      memcpy(ys, &y16, 16);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) xs[i] = x[d + i], ys[i] = y[d + i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(to_float(xs[i]), to_float(ys[i]), sum);
  }
  return sum;
}

constexpr int kPrepareThreads = 128;

template <class E>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Backward<E> a) {
  constexpr int kParts = 8;  // lanes of a row
  const Inputs<E>& p = a.in;
  auto* seen = reinterpret_cast<Interval*>(shared_memory());  // [kRangeRows]
  const int64_t bg = blockIdx.x / a.range_tiles, b = bg / p.G, g = bg % p.G, range = blockIdx.x % a.range_tiles;
  const RowTile tile = row_tile(p, range * kRangeRows, p.rows, kRangeRows);
  for (int row = threadIdx.x / kParts; row < kRangeRows; row += kPrepareThreads / kParts) {
    const bool valid = row < tile.rows;
    const RowPlace r = place(p, tile, valid ? row : 0);
    const int64_t head = g * p.group + r.head;
    float delta = dot_part(a.out.at(b, head, r.position, r.step), a.d_out.at(b, head, r.position, r.step), p,
                           static_cast<int>(threadIdx.x % kParts), kParts);
#pragma unroll
    for (int i = 1; i < kParts; i *= 2) delta += __shfl_xor_sync(0xffffffff, delta, i);
    if (threadIdx.x % kParts == 0) {
      int64_t start;
      const int64_t limit = checked_limit(p, b, r.position, &start);
      const float lse = limit < 0 ? NAN : kLog2E * *a.lse.at(b, head, r.position, r.step);
      seen[row] = limit >= 0 ? text_interval(p, limit, start, r.step) : Interval{0, 0};
      if (valid) a.rows[bg * p.rows + range * kRangeRows + row] = {lse, delta, seen[row]};
    }
  }
  __syncthreads();
  if (g != 0) return;
  const Interval all = hull(seen, kRangeRows);
  if (threadIdx.x == 0) a.ranges[b * a.range_tiles + range] = all;
}

// Products become weights (score) and the gradients of the scores, but for the scale (gradient). state_of(row half or
// column) and key_of are asked for the row and the key of element [m][n][i] of the tile.
template <class C, bool kCapped, class StateOf, class KeyOf>
PYQUIET_DEVICE void weigh(float (&score)[C::kTilesM][C::kTilesN][4], float (&gradient)[C::kTilesM][C::kTilesN][4],
                          const Inputs<typename C::E>& p, StateOf state_of, KeyOf key_of) {
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const RowState row = state_of(m, n, i);
        float x = score[m][n][i] * p.factor, slope = 1.0f;
        if constexpr (kCapped) {
          const float t = capped_tanh(x);
          slope = 1.0f - t * t;
          x = t * p.cap;
        }
        const bool seen = row.seen.has(key_of(m, n, i));
        const float weight = seen ? exp2_approximate(x - row.lse) : 0.0f;
        score[m][n][i] = weight;
        gradient[m][n][i] = seen ? weight * (gradient[m][n][i] - row.delta) * slope : 0.0f;
      }
}

template <class C>
PYQUIET_DEVICE void scale_all(float (&acc)[C::kTilesM][C::kTilesD][4], float by) {
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < C::kTilesD; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[m][n][i] *= by;
}

template <class C>
struct QueryGradientShared {
  alignas(16) typename C::E query[C::kM * C::kStride], d_out[C::kM * C::kStride];
  alignas(16) typename C::E keys_and_values[2][2 * C::kN * C::kStride];
  Interval text[C::kM], own[C::kM];
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    query_gradient_kernel(const __grid_constant__ Backward<typename C::E> a) {
  using E = typename C::E;
  const Inputs<E>& p = a.in;
  auto& shared = *reinterpret_cast<QueryGradientShared<C>*>(shared_memory());
  const int64_t bg = blockIdx.x / a.tiles, b = bg / p.G, g = bg % p.G;
  const int64_t begin = (a.tiles - 1 - blockIdx.x % a.tiles) * C::kM;
  const RowTile tile = row_tile(p, begin, p.rows, C::kM);
  const RowState* states = a.rows + bg * p.rows + begin;
  const auto at_row = [&](const auto& of, int row) {
    const RowPlace r = place(p, tile, row);
    return of.at(b, g * p.group + r.head, r.position, r.step);
  };

  KeyBlocks<C> keys(p, b, g, tile);
  load_rows<C, C::kM>(shared.query, tile.rows, p, [&](int row) { return at_row(p.query, row); });
  load_rows<C, C::kM>(shared.d_out, tile.rows, p, [&](int row) { return at_row(a.d_out, row); });
  keys.load(0, shared.keys_and_values[0]);
  for (int row = threadIdx.x; row < C::kM; row += C::kThreads) {
    shared.text[row] = shared.own[row] = Interval{0, 0};
    if (row >= tile.rows) continue;
    const RowPlace r = place(p, tile, row);
    shared.text[row] = states[row].seen;
    shared.own[row] = own_interval(p, r.step);
    shared.own[row].lo += static_cast<int32_t>(r.position - tile.position) * p.P;
  }
  __syncthreads();
  keys.add_text(shared.text);

  const int warp_row = warp_index() * C::kRowsPerWarp, lane = lane_index();
  const Interval text = hull(shared.text + warp_row, C::kRowsPerWarp),
                 own = hull(shared.own + warp_row, C::kRowsPerWarp);
  E *query = shared.query + warp_row * C::kStride, *d_out = shared.d_out + warp_row * C::kStride;
  RowState rows[2 * C::kTilesM];
#pragma unroll
  for (int i = 0; i < 2 * C::kTilesM; ++i) {
    const int row = warp_row + 8 * i + lane / 4;
    rows[i] = row < tile.rows ? states[row] : RowState{};
  }
  float d_query[C::kTilesM][C::kTilesD][4] = {};
  for (int block = 0; block < keys.blocks; ++block) {
    wait_copies();
    __syncthreads();  // the block is there, and no warp reads the one before it any more
    if (block + 1 < keys.blocks) keys.load(block + 1, shared.keys_and_values[(block + 1) % 2]);
    const Interval* seen = (keys.is_own(block) ? shared.own : shared.text) + warp_row;
    const int32_t first = keys.first_key(block);
    const uint32_t steps = steps_seen<C>(keys.is_own(block) ? own : text, first);
    if (steps == 0) continue;
    const E *key = shared.keys_and_values[block % 2], *value = key + C::kN * C::kStride;
    float score[C::kTilesM][C::kTilesN][4] = {}, gradient[C::kTilesM][C::kTilesN][4] = {};
    multiply_rows<C>(score, query, key, p.D, steps);
    multiply_rows<C>(gradient, d_out, value, p.D, steps);
#pragma unroll
    for (int i = 0; i < 2 * C::kTilesM; ++i) rows[i].seen = seen[8 * i + lane / 4];
    const auto state_of = [&](int m, int, int i) { return rows[2 * m + i / 2]; };
    const auto key_of = [&](int, int n, int i) { return first + 8 * n + lane % 4 * 2 + i % 2; };
    if (p.cap > 0) {
      weigh<C, true>(score, gradient, p, state_of, key_of);
    } else {
      weigh<C, false>(score, gradient, p, state_of, key_of);
    }
    multiply_weights<C>(d_query, gradient, key, p.D, steps);
  }
  scale_all<C>(d_query, a.scale);
  store_rows<C>(d_query, query, tile.rows - warp_row, p, [&](int row) { return at_row(a.d_query, warp_row + row); });
}

// Some keys of one (b, g), of the text or of its paths, and the rows that see them.
template <class C>
struct KeyTile {
  using E = typename C::E;
  const Backward<E>& a;
  const Inputs<E>& p;
  int64_t b, g;
  bool own;
  int64_t first, position;    // key 0, and for paths its position ...
  int32_t in_position, keys;  // ... and place in it
  int64_t begin, end;         // rows that may see the keys

  PYQUIET_DEVICE KeyTile(const Backward<E>& a, int64_t bg, int64_t block)
      : a(a), p(a.in), b(bg / a.in.G), g(bg % a.in.G), own(block >= a.text_blocks) {
    first = own ? (block - a.text_blocks) * a.own_stride : block * C::kM;
    const int64_t left = (own ? p.path_keys : p.S) - first, size = own ? a.own_stride : C::kM;
    keys = static_cast<int32_t>(left < size ? left : size);
    position = own ? first / p.P : 0;
    in_position = own ? static_cast<int32_t>(first - position * p.P) : 0;
    begin = position * p.rows_per_position();
    end = own && p.rows > 0 ? ((first + keys - 1) / p.P + 1) * p.rows_per_position() : p.rows;
    begin = next(begin);
  }

  // The first tile from row `from` on, counted in steps of kN, of which any row may see a key; `end` if there is none.
  PYQUIET_DEVICE int64_t next(int64_t from) const {
    if (own) return from < end ? from : end;
    for (int64_t range = from / kRangeRows; range < a.range_tiles; range += 32) {
      const int64_t mine = range + lane_index();
      const bool seen = mine < a.range_tiles && overlap(a.ranges[b * a.range_tiles + mine], static_cast<int32_t>(first),
                                                        static_cast<int32_t>(first + keys));
      const uint32_t all = __ballot_sync(0xffffffff, seen);
      if (all == 0) continue;
      const int64_t row = (range + __ffs(all) - 1) * kRangeRows;
      return row > from ? row : from < end ? from : end;
    }
    return end;
  }

  template <class T>
  PYQUIET_DEVICE T* at(const Array<T, 4>& of_text, const Array<T, 5>& of_paths, int key) const {
    if (!own) return of_text.at(b, g, first + key);
    const uint32_t flat = in_position + key, offset = p.by_path.quotient(flat);
    return of_paths.at(b, g, position + offset, flat - offset * p.P);
  }

  // The number by which the rows' intervals know key 0.
  PYQUIET_DEVICE int32_t origin() const { return own ? 0 : static_cast<int32_t>(first); }

  // Query, d_out and state of the kN rows from `row` on.
  PYQUIET_DEVICE void load_rows_from(int64_t row, E* to, RowState* states) const {
    const RowTile tile = row_tile(p, row, end, C::kN);
    const auto at_row = [&](const auto& of, int i) {
      const RowPlace r = place(p, tile, i);
      return of.at(b, g * p.group + r.head, r.position, r.step);
    };
    load_rows<C, C::kN>(to, tile.rows, p, [&](int i) { return at_row(p.query, i); });
    load_rows<C, C::kN>(to + C::kN * C::kStride, tile.rows, p, [&](int i) { return at_row(a.d_out, i); });
    for (int i = threadIdx.x; i < C::kN; i += C::kThreads) {
      const bool valid = i < tile.rows;
      const RowState* from = a.rows + (b * p.G + g) * p.rows + row + i;
      if (!own) {
        copy_async(reinterpret_cast<Bytes16*>(states + i), valid ? from : a.rows, valid);
        continue;
      }
      states[i] = valid ? *from : RowState{};
      if (!valid) continue;
      const RowPlace r = place(p, tile, i);
      states[i].seen = own_interval(p, r.step);
      states[i].seen.lo += static_cast<int32_t>(r.position * p.P - first);
    }
  }
};

template <class C>
struct KeyGradientShared {
  alignas(16) typename C::E key[C::kM * C::kStride], value[C::kM * C::kStride];
  alignas(16) typename C::E queries_and_d_outs[2][2 * C::kN * C::kStride];
  RowState rows[2][C::kN];
};

// Both gradients, or at D > 128, where the accumulators of both do not fit the registers, the one of the block.
template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    key_gradient_kernel(const __grid_constant__ Backward<typename C::E> a) {
  using E = typename C::E;
  constexpr int kParts = C::kD > 128 ? 2 : 1;
  const Inputs<E>& p = a.in;
  auto& shared = *reinterpret_cast<KeyGradientShared<C>*>(shared_memory());
  const int64_t item = blockIdx.x / kParts, blocks = a.text_blocks + a.own_blocks;
  const bool of_key = kParts == 1 || blockIdx.x % kParts == 0, of_value = kParts == 1 || !of_key;
  const KeyTile<C> tile(a, item / blocks, item % blocks);

  load_rows<C, C::kM>(shared.key, tile.keys, p, [&](int i) { return tile.at(p.text_key, p.path_key, i); });
  load_rows<C, C::kM>(shared.value, tile.keys, p, [&](int i) { return tile.at(p.text_value, p.path_value, i); });
  const int warp_key = warp_index() * C::kRowsPerWarp, lane = lane_index();
  const int32_t first_key = tile.origin() + warp_key;
  E *key = shared.key + warp_key * C::kStride, *value = shared.value + warp_key * C::kStride;
  float d_value[C::kTilesM][C::kTilesD][4] = {}, d_key_too[kParts == 1 ? C::kTilesM : 1][C::kTilesD][4] = {};
  auto& d_key = kParts == 1 ? d_key_too : d_value;

  int64_t row = tile.begin;
  if (row < tile.end) tile.load_rows_from(row, shared.queries_and_d_outs[0], shared.rows[0]);
  for (int buffer = 0; row < tile.end; buffer ^= 1) {
    const int64_t next = tile.next(row + C::kN);
    wait_copies();
    __syncthreads();  // the rows are there, and no warp reads those before them any more
    if (next < tile.end) tile.load_rows_from(next, shared.queries_and_d_outs[buffer ^ 1], shared.rows[buffer ^ 1]);
    row = next;
    const RowState* rows = shared.rows[buffer];
    uint32_t steps = 0;  // one bit for each 16 rows of which any sees a key of this warp
#pragma unroll
    for (int i = 0; i < C::kN; i += 32) {
      const bool seen =
          i + lane < C::kN && overlap(rows[(i + lane) % C::kN].seen, first_key, first_key + C::kRowsPerWarp);
      const uint32_t all = __ballot_sync(0xffffffff, seen);
      steps |= ((all & 0xffff) != 0 ? 1u : 0u) << i / 16 | (all >> 16 != 0 ? 2u : 0u) << i / 16;
    }
    if (steps == 0) continue;
    const E *query = shared.queries_and_d_outs[buffer], *d_out = query + C::kN * C::kStride;
    float score[C::kTilesM][C::kTilesN][4] = {}, gradient[C::kTilesM][C::kTilesN][4] = {};
    multiply_rows<C>(score, key, query, p.D, steps);
    if (of_key) multiply_rows<C>(gradient, value, d_out, p.D, steps);
    const auto state_of = [&](int, int n, int i) { return rows[8 * n + lane % 4 * 2 + i % 2]; };
    const auto key_of = [&](int m, int, int i) { return first_key + 16 * m + 8 * (i / 2) + lane / 4; };
    if (p.cap > 0) {
      weigh<C, true>(score, gradient, p, state_of, key_of);
    } else {
      weigh<C, false>(score, gradient, p, state_of, key_of);
    }
    if (of_value) multiply_weights<C>(d_value, score, d_out, p.D, steps);
    if (of_key) multiply_weights<C>(d_key, gradient, query, p.D, steps);
  }
  wait_copies();
  __syncthreads();
  const int left = tile.keys - warp_key;
  if (of_value)
    store_rows<C>(d_value, value, left, p,
                  [&](int i) { return tile.at(a.d_text_value, a.d_path_value, warp_key + i); });
  if (of_key) {
    scale_all<C>(d_key, a.scale);
    store_rows<C>(d_key, key, left, p, [&](int i) { return tile.at(a.d_text_key, a.d_path_key, warp_key + i); });
  }
}

}  // namespace pyquiet
