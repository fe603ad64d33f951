// Thought attention, forward, fp32, one instruction set (compiled once for each).
//
// The rows of one (b, g), i.e. (position, head of the group, query step), are cut into tiles of 48
// with nearly equal text limits. Inside a tile the SIMD lanes are rows: Q is transposed once,
// scores stand as [key][row], so row maxima and sums need no horizontal step, and a key is masked
// lane by lane (the ragged end costs single keys, not key blocks).
//
// scores: S[key][row] = K[key][:] . Q^T[:][row], 8 keys x 3 vectors of rows in registers (4 x 3 with 16 registers)
//
// softmax: online, base 2, per block of 64 keys
//
// values: O[row][:] += P[key][row] * V[key][:], 6 rows x 4 vectors of channels (6 x 2)
//
// K and V are read in their own layout, whatever the strides. The own path follows as further keys
// of the same online softmax (which is the log-sum-exp merge), row by row with lanes = channels; so
// do the text keys when a (b, g) has too few rows to fill a vector, as in decoding. No atomics: a
// row belongs to one thread, results ignore the thread count.
#include <algorithm>
#include <cmath>

#include "cpu_tile.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

constexpr int kValueRows = 6;
constexpr int kValueVectors = kRegisters == 32 ? 4 : 2;

void describe_rows(const Problem& p, int64_t b, int64_t g, int64_t begin, Tile& tile) {
  const ThoughtAttention& a = p.a;
  const int64_t start = a.text_start ? *a.text_start.at(b) : 0;
  tile.rows = static_cast<int>(std::min<int64_t>(kRows, p.rows - begin));
  tile.vectors = (tile.rows + kLanes - 1) / kLanes;
  RowCursor cursor(p, b, g, begin);
  for (int i = 0; i < tile.rows; ++i, cursor.next()) {
    const int64_t limit = *a.text_limits.at(b, cursor.position);
    int64_t first = start;
    if (a.window > 0) first = std::max(first, limit + p.P - p.Q + cursor.step - a.window + 1);
    tile.row[i] = cursor.row();
    tile.first[i] = static_cast<int32_t>(std::min(first, limit));
    tile.limit[i] = static_cast<int32_t>(limit);
  }
  tile.close_rows();
  std::fill_n(tile.max, kRows, kNegInf);
  std::fill_n(tile.sum, kRows, 0.0f);
  std::fill_n(tile.out, kRows * p.D, 0.0f);
}

void transpose_query(const Problem& p, Tile& tile) {
  for (int i = 0; i < tile.vectors * kLanes; i += 4) {
    const float* row[4];
    for (int j = 0; j < 4; ++j) row[j] = tile.row[std::min(i + j, tile.rows - 1)].query;
    for (int64_t d = 0; d < p.D; d += 4) {
      F4 r0 = load<F4>(row[0] + d), r1 = load<F4>(row[1] + d), r2 = load<F4>(row[2] + d), r3 = load<F4>(row[3] + d);
      transpose4(r0, r1, r2, r3);
      float* to = tile.query_t + d * kRows + i;
      store(to, r0 * p.factor);
      store(to + kRows, r1 * p.factor);
      store(to + 2 * kRows, r2 * p.factor);
      store(to + 3 * kRows, r3 * p.factor);
    }
  }
}

// score[j][0 .. Vectors * kLanes) for one group of kKeysAtOnce keys.
template <int Vectors>
void score_keys(const float* key, int64_t stride, int64_t D, const float* query_t, float* score) {
  F acc[kKeysAtOnce][Vectors] = {};
  const float *key3 = key + 3 * stride,
              *key6 = key + 6 * stride;  // three bases: x86 can add 0, 1 or 2 strides
  for (int64_t d = 0; d < D; ++d) {
    F q[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) q[v] = load(query_t + d * kRows + v * kLanes);
#pragma GCC unroll 8
    for (int j = 0; j < kKeysAtOnce; ++j) {
      const float* base = j < 3 ? key : j < 6 ? key3 : key6;
      const F x = fill(base[d + (j % 3) * stride]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[j][v] += x * q[v];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kKeysAtOnce; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(score + j * kRows + v * kLanes, acc[j][v]);
}

// Scores of n keys; the last group is completed with keys nobody reads, from a copy where the text
// ends before it.
void score_block(const float* key, int64_t stride, int n, bool text_ends, Tile& tile) {
  for (int j = 0; j < n; j += kKeysAtOnce) {
    tile.prefetch.some(tile.D);
    const float* group = key + j * stride;
    int64_t step = stride;
    if (text_ends && j + kKeysAtOnce > n) {
      for (int i = 0; i < n - j; ++i) std::copy_n(group + i * stride, tile.D, tile.spare + i * tile.D);
      group = tile.spare;
      step = tile.D;
    }
    for (int v = 0; v < tile.vectors; v += 3) {
      const float* query_t = tile.query_t + v * kLanes;
      float* score = tile.score + j * kRows + v * kLanes;
      switch (std::min(3, tile.vectors - v)) {
        case 3:
          score_keys<3>(group, step, tile.D, query_t, score);
          break;
        case 2:
          score_keys<2>(group, step, tile.D, query_t, score);
          break;
        default:
          score_keys<1>(group, step, tile.D, query_t, score);
      }
    }
  }
}

// One online-softmax step: scores become weights, max and sum move on, rescale is what the old sum
// and out are to be multiplied with. A row without a key so far has max -inf; 0 stands in for it,
// so that no -inf - -inf arises.
template <bool Masked>
void softmax_block(int32_t key0, int n, float cap, Tile& tile) {
  for (int r = 0; r < tile.vectors * kLanes; r += kLanes) {
    float* score = tile.score + r;
    const I first = load_ints(tile.first + r), limit = load_ints(tile.limit + r);
    const F old_max = load(tile.max + r);
    F top = old_max;
    for (int j = 0; j < n; ++j) {
      F s = load(score + j * kRows);
      if (cap > 0) s = tanh(s) * cap;
      if (Masked) s = ((fill(key0 + j) >= first) & (fill(key0 + j) < limit)) ? s : fill(kNegInf);
      if (Masked || cap > 0) store(score + j * kRows, s);
      top = max(s, top);
    }
    const F base = top == kNegInf ? F{} : top;
    const F rescale = exp2(old_max - base);
    F sum = load(tile.sum + r) * rescale;
    for (int j = 0; j < n; ++j) {
      const F s = load(score + j * kRows);
      F weight = exp2(s - base);
      if (Masked) weight = s == kNegInf ? F{} : weight;
      store(score + j * kRows, weight);
      sum += weight;
    }
    store(tile.max + r, top);
    store(tile.sum + r, sum);
    store(tile.rescale + r, rescale);
  }
}

// out[row][0 .. Vectors) = out * rescale[row] + sum_j score[j][row] * value[j], for kValueRows
// rows.
template <int Vectors, class V>
void add_values(const float* score, const float* rescale, const float* value, int64_t stride, int n, float* out,
                int64_t D) {
  constexpr int kWidth = sizeof(V) / sizeof(float);
  V acc[kValueRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kValueRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) acc[r][v] = load<V>(out + r * D + v * kWidth) * rescale[r];
  for (int j = 0; j < n; ++j) {
    V x[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x[v] = load<V>(value + j * stride + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kValueRows; ++r) {
      const float weight = score[j * kRows + r];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) acc[r][v] += weight * x[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kValueRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) store(out + r * D + v * kWidth, acc[r][v]);
}

// Calls part(width tag, channel) over the D channels: vectors by the handful, then single ones,
// then half a vector.
template <class Many, class One, class Half>
void over_channels(int64_t D, Many many, One one, Half half) {
  int64_t d = 0;
  for (; d + kValueVectors * kLanes <= D; d += kValueVectors * kLanes) many(d);
  for (; d + kLanes <= D; d += kLanes) one(d);
  if (d < D) half(d);  // D is a multiple of 8, so only a 16-lane vector leaves a rest
}

using HalfF = Lanes<(kLanes > 8 ? 8 : kLanes)>::F;

void value_block(const float* value, int64_t stride, int n, Tile& tile) {
  for (int r = 0; r < tile.rows; r += kValueRows) {
    tile.prefetch.some(tile.D);
    const float *score = tile.score + r, *rescale = tile.rescale + r;
    float* out = tile.out + r * tile.D;
    over_channels(
        tile.D, [&](int64_t d) { add_values<kValueVectors, F>(score, rescale, value + d, stride, n, out + d, tile.D); },
        [&](int64_t d) { add_values<1, F>(score, rescale, value + d, stride, n, out + d, tile.D); },
        [&](int64_t d) { add_values<1, HalfF>(score, rescale, value + d, stride, n, out + d, tile.D); });
  }
}

// Queues what this tile reads and writes at its end, and the queries of the tile that this thread probably does next.
void plan_prefetch(const Problem& p, int64_t b, int64_t g, int64_t next_b, int64_t next_g, int64_t next_begin,
                   Tile& tile) {
  Prefetch& queue = tile.prefetch;
  queue.count = queue.done = 0;
  for (int r = 0; r < tile.rows; ++r)
    queue.add(p.a.out.at(b, tile.row[r].head, tile.row[r].position, tile.row[r].step));
  queue.to_write = queue.count;
  if (next_begin >= 0) {
    RowCursor cursor(p, next_b, next_g, next_begin);
    for (int64_t r = 0; r < std::min<int64_t>(kRows, p.rows - next_begin); ++r, cursor.next())
      queue.add(cursor.row().query);
  }
  for (int64_t t = tile.row[0].position; t <= tile.row[tile.rows - 1].position; ++t)
    for (int64_t j = 0; j < p.P; ++j) {
      queue.add(p.a.path_key.at(b, g, t, j));
      queue.add(p.a.path_value.at(b, g, t, j));
    }
  const int span = tile.end - tile.begin, blocks = (span + kKeyBlock - 1) / kKeyBlock;
  const int calls = span / kKeysAtOnce + blocks * (tile.rows + kValueRows - 1) / kValueRows + 1;
  queue.quota = (queue.count + calls - 1) / calls;
}

void attend_text(const Problem& p, int64_t b, int64_t g, Tile& tile) {
  const int64_t key_stride = p.a.text_key.stride[2], value_stride = p.a.text_value.stride[2];
  for (int32_t key0 = tile.begin; key0 < tile.end; key0 += kKeyBlock) {
    const int n = std::min<int32_t>(kKeyBlock, tile.end - key0);
    score_block(p.a.text_key.at(b, g, key0), key_stride, n, key0 + kKeyBlock > p.S, tile);
    const bool masked = key0 < tile.all_from || key0 + n > tile.all_to;
    (masked ? softmax_block<true> : softmax_block<false>)(key0, n, p.cap, tile);
    value_block(p.a.text_value.at(b, g, key0), value_stride, n, tile);
  }
}

// score[j][r] = factor * query . key_j for four keys, lanes = channels.
template <class V>
F4 dot4(const float* query, const float* const key[4], int64_t D) {
  constexpr int kWidth = sizeof(V) / sizeof(float);
  V acc[4] = {};
  int64_t d = 0;
  for (; d + kWidth <= D; d += kWidth) {
    const V q = load<V>(query + d);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[j] += q * load<V>(key[j] + d);
  }
  F4 total = sum4(acc[0], acc[1], acc[2], acc[3]);
  if constexpr (kWidth > 8)
    if (d < D) {
      const float* rest[4] = {key[0] + d, key[1] + d, key[2] + d, key[3] + d};
      total += dot4<HalfF>(query + d, rest, D - d);
    }
  return total;
}

template <int Vectors, class V>
void add_row_values(const float* score, float rescale, const float* value, int64_t stride, int begin, int end,
                    float* out) {
  constexpr int kWidth = sizeof(V) / sizeof(float);
  V acc[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) acc[v] = load<V>(out + v * kWidth) * rescale;
  for (int j = begin; j < end; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) acc[v] += score[j * kRows] * load<V>(value + j * stride + v * kWidth);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(out + v * kWidth, acc[v]);
}

// Keys begin .. end of an array of a row's own (key_of(r), value_of(r)), row by row, lanes =
// channels; row r sees first[r] <= j < limit[r]. Only the softmax goes over the rows together.
template <class KeyOf, class ValueOf>
void attend_by_row(const Problem& p, KeyOf key_of, int64_t key_stride, ValueOf value_of, int64_t value_stride,
                   Tile& tile) {
  for (int32_t key0 = tile.begin; key0 < tile.end; key0 += kKeyBlock) {
    const int n = std::min(kKeyBlock, tile.end - key0);
    for (int r = 0; r < tile.rows; ++r) {
      const int begin = std::max(tile.first[r] - key0, 0), stop = std::min(tile.limit[r] - key0, n);
      const float* key = key_of(r) + key0 * key_stride;
      for (int j = begin; j < stop; j += 4) {
        const float* four[4];
        for (int i = 0; i < 4; ++i) four[i] = key + std::min(j + i, stop - 1) * key_stride;
        const F4 s = dot4<F>(tile.row[r].query, four, p.D) * p.factor;
        for (int i = 0; i < std::min(4, stop - j); ++i) tile.score[(j + i) * kRows + r] = s[i];
      }
    }
    softmax_block<true>(key0, n, p.cap, tile);
    for (int r = 0; r < tile.rows; ++r) {
      const int begin = std::max(tile.first[r] - key0, 0), stop = std::min(tile.limit[r] - key0, n);
      const float *score = tile.score + r, *value = value_of(r) + key0 * value_stride;
      const float rescale = tile.rescale[r];
      float* out = tile.out + r * p.D;
      over_channels(
          p.D,
          [&](int64_t d) {
            add_row_values<kValueVectors, F>(score, rescale, value + d, value_stride, begin, stop, out + d);
          },
          [&](int64_t d) { add_row_values<1, F>(score, rescale, value + d, value_stride, begin, stop, out + d); },
          [&](int64_t d) { add_row_values<1, HalfF>(score, rescale, value + d, value_stride, begin, stop, out + d); });
    }
  }
}

void attend_text_by_row(const Problem& p, int64_t b, int64_t g, Tile& tile) {
  attend_by_row(
      p, [&](int) { return p.a.text_key.at(b, g); }, p.a.text_key.stride[2],
      [&](int) { return p.a.text_value.at(b, g); }, p.a.text_value.stride[2], tile);
}

void attend_own_path(const Problem& p, int64_t b, int64_t g, Tile& tile) {
  for (int r = 0; r < tile.rows; ++r) {
    const int64_t end = p.P - p.Q + tile.row[r].step + 1;
    tile.limit[r] = static_cast<int32_t>(end);
    tile.first[r] = static_cast<int32_t>(p.a.window > 0 ? std::max<int64_t>(0, end - p.a.window) : 0);
  }
  tile.close_rows();
  attend_by_row(
      p, [&](int r) { return p.a.path_key.at(b, g, tile.row[r].position); }, p.a.path_key.stride[3],
      [&](int r) { return p.a.path_value.at(b, g, tile.row[r].position); }, p.a.path_value.stride[3], tile);
}

void write_row(const Problem& p, int64_t b, int r, const Tile& tile) {
  const Row& row = tile.row[r];
  const float inverse = 1.0f / tile.sum[r];  // its own key at least is in the sum
  const float* from = tile.out + r * p.D;
  float* to = p.a.out.at(b, row.head, row.position, row.step);
  for (int64_t d = 0; d < p.D; ++d) to[d] = from[d] * inverse;
  if (p.a.lse) *p.a.lse.at(b, row.head, row.position, row.step) = kLn2 * (tile.max[r] + std::log2(tile.sum[r]));
}

// Items go through the heads one by one, in each from the longest prefix to the shortest.
void attend_item(const Problem& p, int64_t item, int64_t items, Tile& tile) {
  const int64_t head = item / p.tiles, b = head / p.G, g = head % p.G;
  describe_rows(p, b, g, p.first_row(item), tile);
  if (tile.rows * 2 >= kLanes) {
    const int64_t next = item + p.a.threads, next_head = next / p.tiles;
    plan_prefetch(p, b, g, next_head / p.G, next_head % p.G, next < items ? p.first_row(next) : -1, tile);
    transpose_query(p, tile);
    attend_text(p, b, g, tile);
  } else {
    attend_text_by_row(p, b, g, tile);
  }
  attend_own_path(p, b, g, tile);
  for (int r = 0; r < tile.rows; ++r) write_row(p, b, r, tile);
}

}  // namespace

void thought_attention_forward(const ThoughtAttention& a) {
  const Problem p{a};
  const int64_t items = p.B * p.G * p.tiles;
#pragma omp parallel num_threads(a.threads) if (items > 1)
  {
    static thread_local Tile tile;  // large, and kept for the next call
    tile.D = p.D;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < items; ++item) attend_item(p, item, items, tile);
  }
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
