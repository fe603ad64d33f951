// The forward kernel of thought attention: one block a tile of kM query rows.
#pragma once

#include "cuda_tile.cuh"

namespace pyquiet {

template <class E>
struct Forward {
  Inputs<E> in;
  Array<E, 5> out;
  Array<float, 4> lse;  // no data: not wanted
  int64_t tiles;        // of a (b, g)
};

// The online softmax of a warp's rows. Scores are in base 2. A row without a key so far has max -inf; 0 stands in for
// it, so that no -inf - -inf arises.
template <class C>
struct SoftmaxState {
  float max[2 * C::kTilesM], sum[2 * C::kTilesM];  // rows 8 i + lane / 4; sum over this lane's columns
  float out[C::kTilesM][C::kTilesD][4] = {};

  // Scores become weights.
  PYQUIET_DEVICE void update(float (&score)[C::kTilesM][C::kTilesN][4]) {
    float rescale[2 * C::kTilesM];
    bool moved = false;
#pragma unroll
    for (int i = 0; i < 2 * C::kTilesM; ++i) {
      float top = max[i];
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
        top = fmaxf(top, fmaxf(score[i / 2][n][i % 2 * 2], score[i / 2][n][i % 2 * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
      const float base = top == kNegInf ? 0.0f : top;
      rescale[i] = exp2_approximate(max[i] - base);
      moved |= rescale[i] != 1.0f;
      max[i] = top;
      sum[i] *= rescale[i];
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& weight = score[i / 2][n][i % 2 * 2 + j];
          weight = exp2_approximate(weight - base);
          sum[i] += weight;
        }
    }
    if (!__any_sync(0xffffffff, moved)) return;
#pragma unroll
    for (int i = 0; i < 2 * C::kTilesM; ++i)
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) {
        out[i / 2][n][i % 2 * 2] *= rescale[i];
        out[i / 2][n][i % 2 * 2 + 1] *= rescale[i];
      }
  }

  // out becomes the weighted mean; every lane of a row then holds its whole sum.
  PYQUIET_DEVICE void finish() {
#pragma unroll
    for (int i = 0; i < 2 * C::kTilesM; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffff, sum[i], 2);
      const float inverse = reciprocal_approximate(sum[i]);
#pragma unroll
      for (int n = 0; n < C::kTilesD; ++n) {
        out[i / 2][n][i % 2 * 2] *= inverse;
        out[i / 2][n][i % 2 * 2 + 1] *= inverse;
      }
    }
  }
};

template <class C>
struct ForwardShared {
  alignas(16) typename C::E query[C::kM * C::kStride];
  alignas(16) typename C::E keys_and_values[2][2 * C::kN * C::kStride];
  Interval text[C::kM], own[C::kM];
};

// Brings the products of a block to base 2, capped, and hides what the warp's rows do not see.
template <class C>
PYQUIET_DEVICE void finish_scores(float (&score)[C::kTilesM][C::kTilesN][4], const Inputs<typename C::E>& p,
                                  const Interval* of_rows, int32_t first) {
  const int lane = lane_index();
#pragma unroll
  for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) score[m][n][i] *= p.factor;
  if (p.cap > 0) {
#pragma unroll
    for (int m = 0; m < C::kTilesM; ++m)
#pragma unroll
      for (int n = 0; n < C::kTilesN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][n][i] = capped_tanh(score[m][n][i]) * p.cap;
  }
#pragma unroll
  for (int i = 0; i < 2 * C::kTilesM; ++i) {
    const Interval row = of_rows[8 * i + lane / 4];
    if (__all_sync(0xffffffff, row.has(first) && row.has(first + C::kN - 1))) continue;
#pragma unroll
    for (int n = 0; n < C::kTilesN; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (!row.has(first + 8 * n + lane % 4 * 2 + j)) score[i / 2][n][i % 2 * 2 + j] = kNegInf;
  }
}

template <class C>
PYQUIET_DEVICE void attend_block(SoftmaxState<C>& state, const Inputs<typename C::E>& p, const typename C::E* query,
                                 const typename C::E* key, const Interval* of_rows, int32_t first, uint32_t steps) {
  float score[C::kTilesM][C::kTilesN][4] = {};
  multiply_rows<C>(score, query, key, p.D, steps);
  finish_scores<C>(score, p, of_rows, first);
  state.update(score);
  multiply_weights<C>(state.out, score, key + C::kN * C::kStride, p.D, steps);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    forward_kernel(const __grid_constant__ Forward<typename C::E> a) {
  const Inputs<typename C::E>& p = a.in;
  auto& shared = *reinterpret_cast<ForwardShared<C>*>(shared_memory());
  // The last tiles, which usually have the most keys, come first; a (b, g) is finished before the next one starts, so
  // that its keys stay in the cache.
  const int64_t bg = blockIdx.x / a.tiles, b = bg / p.G, g = bg % p.G;
  const int64_t begin = (a.tiles - 1 - blockIdx.x % a.tiles) * C::kM;
  const RowTile tile = row_tile(p, begin, p.rows, C::kM);
  const auto at_row = [&](const auto& of, int row) {
    const RowPlace r = place(p, tile, row);
    return of.at(b, g * p.group + r.head, r.position, r.step);
  };

  KeyBlocks<C> keys(p, b, g, tile);
  load_rows<C, C::kM>(shared.query, tile.rows, p, [&](int row) { return at_row(p.query, row); });
  keys.load(0, shared.keys_and_values[0]);
  for (int row = threadIdx.x; row < C::kM; row += C::kThreads) {
    shared.text[row] = shared.own[row] = Interval{0, 0};
    if (row >= tile.rows) continue;
    const RowPlace r = place(p, tile, row);
    int64_t start;
    const int64_t limit = checked_limit(p, b, r.position, &start);
    if (limit < 0) continue;  // sees nothing, not even its own path, which is how it is known later on
    shared.text[row] = text_interval(p, limit, start, r.step);
    shared.own[row] = own_interval(p, r.step);
    shared.own[row].lo += static_cast<int32_t>(r.position - tile.position) * p.P;
  }
  __syncthreads();
  keys.add_text(shared.text);

  const int warp_row = warp_index() * C::kRowsPerWarp, lane = lane_index();
  const Interval text = hull(shared.text + warp_row, C::kRowsPerWarp),
                 own = hull(shared.own + warp_row, C::kRowsPerWarp);
  typename C::E* query = shared.query + warp_row * C::kStride;
  SoftmaxState<C> state;
#pragma unroll
  for (int i = 0; i < 2 * C::kTilesM; ++i) {
    state.max[i] = kNegInf;
    state.sum[i] = shared.own[warp_row + 8 * i + lane / 4].count > 0 ? 0.0f : NAN;
  }
  for (int block = 0; block < keys.blocks; ++block) {
    wait_copies();
    __syncthreads();  // the block is there, and no warp reads the one before it any more
    if (block + 1 < keys.blocks) keys.load(block + 1, shared.keys_and_values[(block + 1) % 2]);
    const bool is_own = keys.is_own(block);
    const int32_t first = keys.first_key(block);
    const uint32_t steps = steps_seen<C>(is_own ? own : text, first);
    if (steps != 0)
      attend_block<C>(state, p, query, shared.keys_and_values[block % 2],
                      (is_own ? shared.own : shared.text) + warp_row, first, steps);
  }
  state.finish();
  store_rows<C>(state.out, query, tile.rows - warp_row, p, [&](int row) { return at_row(a.out, warp_row + row); });
  if (!a.lse.data || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2 * C::kTilesM; ++i) {
    const int row = warp_row + 8 * i + lane / 4;
    if (row < tile.rows) *at_row(a.lse, row) = kLn2 * (state.max[i] + log2f(state.sum[i]));
  }
}

}  // namespace pyquiet
