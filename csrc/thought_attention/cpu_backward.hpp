// Thought attention, backward, one instruction set.
//
// With the saved log-sum-exp of text and own path together, weights are recomputed block by block, never stored:
//   p = exp2(score - lse),   ds = p (d_out . v - delta) scale,   delta = out . d_out
// For a block of 64 text keys and a tile of rows, with scores as [key][row] (cpu_rows.hpp), five products:
//   score = K Q^T, d_weight = V d_out^T       lanes = rows
//   dV += p d_out, dK += ds Q                 lanes = channels
//   dQ^T += K^T ds                            lanes = rows
// Own paths take the same steps with dot products row by row, and small products position by position.
//
// A unit of work is one share of the positions of a (b, g): it keeps text dK and dV of its own, so there are no
// atomics. The number of shares depends on the shape alone, and they are added in order: results ignore the thread
// count. Chunks of whole positions are dealt to the shares in turn, since the last ones see the longest text.
#pragma once

#include <cmath>

#include "cpu_packed.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

// Units that keep many cores busy; a (b, g) is cut into shares where there are fewer of them.
constexpr int64_t kUnits = 16;

// Consecutive positions whose rows are worked on together, as few rows short of whole tiles as can be.
template <class E>
int64_t positions_a_chunk(const Problem<E>& p) {
  const int64_t rows = p.group * p.Q;
  int64_t best = 1, waste = kRows;
  for (int64_t n = 1; n * rows <= std::max<int64_t>(4 * kRows, rows); ++n) {
    const int64_t tiles = (n * rows + kRows - 1) / kRows, unused = (tiles * kRows - n * rows) / tiles;
    if (unused < waste) best = n, waste = unused;
  }
  return std::min(best, p.T);
}

// What one thread keeps: its share's gradients of text keys and values, those of the chunk's own paths, and the tile.
template <class E>
struct BackwardTile {
  RowSet text, own;
  alignas(64) float query_t[kMaxD * kRows], d_out_t[kMaxD * kRows], d_query_t[kMaxD * kRows];  // [D][kRows]
  alignas(64) float query[kRows * kMaxD], d_out[kRows * kMaxD], d_query[kRows * kMaxD];        // [kRows][padded_D]
  alignas(64) float score[kKeyBlock * kRows], d_score[kKeyBlock * kRows];                      // [key][row]
  alignas(64) float spare_key[2 * kKeyBlock * kMaxD], spare_value[kKeyBlock * kMaxD];
  alignas(64) float lse[kRows], delta[kRows];
  RowProducts products;
  // In packed form: right matrices over channels and over rows; weights and their gradients, left and right.
  alignas(64) uint16_t query_channels[kMaxD * kRows], d_out_channels[kMaxD * kRows];
  alignas(64) uint16_t query_rows[kMaxD * kRows], d_out_rows[kMaxD * kRows];
  alignas(64) uint16_t weight_left[kKeyBlock * kRows], d_score_left[kKeyBlock * kRows],
      d_score_right[kKeyBlock * kRows];
  alignas(64) uint16_t spare_packed[kMaxD * kKeyBlock];
  Scratch<float> text_memory, path_memory;
  float *d_text_key, *d_text_value;  // [S and a block][padded_D]
  float *d_path_key, *d_path_value;  // [positions of the chunk][P][padded_D]
  Prefetch<E> prefetch;
};

// Queues what this tile reads and writes at its end, and the rows of the tile that this thread does next.
template <class E>
void plan_prefetch(const Problem<E>& p, const ThoughtAttentionBackward<E>& a, int64_t b, int64_t g, int64_t next,
                   int64_t next_rows, BackwardTile<E>& tile) {
  const RowSet& set = tile.text;
  Prefetch<E>& queue = tile.prefetch;
  queue.clear();
  const auto add_rows = [&](int64_t flat, int64_t rows, const auto&... views) {
    for_each_run(p, g, flat, rows, [&](int, int n, const Row& row) {
      (queue.add(views.at(b, row.head, row.position, row.step), views.stride[3], n), ...);
    });
  };
  const auto add_paths = [&](const auto&... views) {
    for (int64_t t = set.row[0].position; t <= set.row[set.rows - 1].position; ++t)
      (queue.add(views.at(b, g, t), views.stride[3], p.P), ...);
  };
  add_rows(set.flat, set.rows, a.d_query);
  add_paths(a.d_path_key, a.d_path_value);
  queue.to_write = queue.count;
  add_paths(a.path_key, a.path_value);
  add_rows(next, next_rows, a.query, a.d_out, a.out);
  const int64_t span = set.end - set.begin, blocks = (span + kKeyBlock - 1) / kKeyBlock;
  const int64_t handful = p.packed && kHasTiles ? 32 : kGemmRows,
                handfuls = 4 * (span / handful) + blocks * p.D / handful;
  queue.spread(p.packed ? handfuls + 1 : handfuls * (kKeyBlock / kBetween) + 1);
}

// Rows of the tile as they lie (rows) and transposed (lanes), lse in base 2, and delta.
template <class E>
void load_tile(const Problem<E>& p, const ThoughtAttentionBackward<E>& a, int64_t b, BackwardTile<E>& tile) {
  const RowSet& set = tile.text;
  const auto at = [&](const View<const E, 5>& view, int r) {
    return view.at(b, set.row[r].head, set.row[r].position, set.row[r].step);
  };
  to_lanes(set, p.D, [&](int r) { return at(a.query, r); }, tile.query_t);
  to_lanes(set, p.D, [&](int r) { return at(a.d_out, r); }, tile.d_out_t);
  for (int r = 0; r < set.vectors * kLanes; ++r) {
    const int from = std::min(r, set.rows - 1);
    const Row& row = set.row[from];
    copy_row(at(a.query, from), p.D, p.padded_D, tile.query + r * p.padded_D);
    copy_row(at(a.d_out, from), p.D, p.padded_D, tile.d_out + r * p.padded_D);
    tile.delta[r] = dot(at(a.out, from), at(a.d_out, from), p.D);
    tile.lse[r] = *a.lse.at(b, row.head, row.position, row.step) * kLog2E;
  }
  std::fill_n(tile.d_query_t, p.padded_D * kRows, 0.0f);
  std::fill_n(tile.d_query, set.rows * p.padded_D, 0.0f);
}

// Scores become weights p, and products d_out . v become ds; keys n .. padded, that nobody sees, become 0.
template <bool Masked>
void differentiate(const RowSet& set, int32_t key0, int n, int padded, float factor, float scale, float cap,
                   const float* lse, const float* delta, float* score, float* d_score) {
  for (int r = 0; r < set.vectors * kLanes; r += kLanes) {
    const I first = load_ints(set.first + r), limit = load_ints(set.limit + r);
    const F row_lse = load(lse + r), row_delta = load(delta + r);
    for (int j = 0; j < n; ++j) {
      F s = load(score + j * kRows + r) * factor, slope = fill(scale);
      if (cap > 0) {
        const F t = tanh(s);
        s = t * cap;
        slope *= 1.0f - t * t;
      }
      F p = exp2(s - row_lse);
      F ds = p * (load(d_score + j * kRows + r) - row_delta) * slope;
      if (Masked) {
        const I seen = (fill(key0 + j) >= first) & (fill(key0 + j) < limit);
        p = seen ? p : F{};
        ds = seen ? ds : F{};
      }
      store(score + j * kRows + r, p);
      store(d_score + j * kRows + r, ds);
    }
    for (int j = n; j < padded; ++j) {
      store(score + j * kRows + r, F{});
      store(d_score + j * kRows + r, F{});
    }
  }
}

template <class E>
void differentiate(const Problem<E>& p, const RowSet& set, int32_t key0, int n, int padded, BackwardTile<E>& tile) {
  (set.masked(key0, n) ? differentiate<true> : differentiate<false>)(set, key0, n, padded, p.factor, p.a.scale, p.cap,
                                                                     tile.lse, tile.delta, tile.score, tile.d_score);
}

template <class E>
void text_gradients(const Problem<E>& p, int64_t b, int64_t g, BackwardTile<E>& tile) {
  const RowSet& set = tile.text;
  const int channels = static_cast<int>(p.padded_D / kLanes);
  const auto prefetch = [&] { tile.prefetch.some(p.D); };
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min<int32_t>(kKeyBlock, set.end - key0), padded = rounded_keys(n);
    const Block key = rows_as_floats(p.a.text_key.at(b, g), p.a.text_key.stride[2], key0, n, p.S, p, tile.spare_key);
    const Block value =
        rows_as_floats(p.a.text_value.at(b, g), p.a.text_value.stride[2], key0, n, p.S, p, tile.spare_value);
    gemm<Start::zero, Layout::rows>(padded, set.vectors,
                                    {key.data, key.stride, tile.query_t, kRows, tile.score, kRows, p.D}, prefetch);
    gemm<Start::zero, Layout::rows>(
        padded, set.vectors, {value.data, value.stride, tile.d_out_t, kRows, tile.d_score, kRows, p.D}, prefetch);
    differentiate(p, set, key0, n, padded, tile);
    const auto to_key = [&](const float* weight, const float* rows, float* gradient) {
      gemm<Start::add, Layout::rows>(
          padded, channels, {weight, kRows, rows, p.padded_D, gradient + key0 * p.padded_D, p.padded_D, set.rows},
          prefetch);
    };
    to_key(tile.score, tile.d_out, tile.d_text_value);
    to_key(tile.d_score, tile.query, tile.d_text_key);
    gemm<Start::add, Layout::columns>(p.D, set.vectors,
                                      {key.data, key.stride, tile.d_score, kRows, tile.d_query_t, kRows, n}, prefetch);
  }
}

// The same with the text's packed keys and values: 0 keys by rows, 1 values by rows, 2 keys by columns.
template <class E>
void packed_text_gradients(const Problem<E>& p, const PackedText<E>& text, int64_t slot, BackwardTile<E>& tile) {
  constexpr int kVectors = kRows / kLanes;
  const RowSet& set = tile.text;
  const int channels = static_cast<int>(p.padded_D / kLanes);
  const Packed query{tile.query_channels, 2 * kRows}, d_out{tile.d_out_channels, 2 * kRows};
  const Packed query_rows{tile.query_rows, 2 * p.padded_D}, d_out_rows{tile.d_out_rows, 2 * p.padded_D};
  pack_right(tile.query_t, kRows, p.D, text.width, kVectors, query);
  pack_right(tile.d_out_t, kRows, p.D, text.width, kVectors, d_out);
  pack_right(tile.query, p.padded_D, set.rows, kRows, channels, query_rows);
  pack_right(tile.d_out, p.padded_D, set.rows, kRows, channels, d_out_rows);
  const auto prefetch = [&] { tile.prefetch.some(p.D); };
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min<int32_t>(kKeyBlock, set.end - key0), padded = static_cast<int>(rounded_up(n, 16));
    packed_gemm<Start::zero>(n, kRows, text.width, text.rows(slot, 0, key0), query, tile.score, kRows, nullptr,
                             prefetch);
    packed_gemm<Start::zero>(n, kRows, text.width, text.rows(slot, 1, key0), d_out, tile.d_score, kRows, nullptr,
                             prefetch);
    differentiate(p, set, key0, n, padded, tile);
    const Packed weight{tile.weight_left, kRows}, d_score{tile.d_score_left, kRows};
    pack_left(tile.score, kRows, padded, kVectors, weight);
    pack_left(tile.d_score, kRows, padded, kVectors, d_score);
    const int64_t offset = key0 * p.padded_D;
    packed_gemm<Start::add>(n, p.padded_D, kRows, weight, d_out_rows, tile.d_text_value + offset, p.padded_D, nullptr,
                            prefetch);
    packed_gemm<Start::add>(n, p.padded_D, kRows, d_score, query_rows, tile.d_text_key + offset, p.padded_D, nullptr,
                            prefetch);
    const int64_t depth = rounded_up(n, kDepth);
    const Packed by_key{tile.d_score_right, 2 * kRows};
    pack_right(tile.d_score, kRows, n, depth, kVectors, by_key);
    packed_gemm<Start::add>(p.D, kRows, depth,
                            whole_depth(text.columns(slot, 2, key0), text.width, n, tile.spare_packed), by_key,
                            tile.d_query_t, kRows, nullptr, prefetch);
  }
}

// The own keys key0 .. key0 + n of the position of rows from .. to, and what these rows add to their gradients.
template <class E>
void own_position(const Problem<E>& p, int64_t b, int64_t g, int from, int to, int32_t key0, int n, int64_t slot,
                  BackwardTile<E>& tile) {
  const int64_t position = tile.text.row[from].position, offset = (slot * p.P + key0) * p.padded_D;
  const int channels = static_cast<int>(p.padded_D / kLanes);
  const auto to_key = [&](const float* weight, const float* rows, float* gradient) {
    gemm<Start::add, Layout::rows>(
        n, channels,
        {weight + from, kRows, rows + from * p.padded_D, p.padded_D, gradient + offset, p.padded_D, to - from});
  };
  to_key(tile.score, tile.d_out, tile.d_path_value);
  to_key(tile.d_score, tile.query, tile.d_path_key);
  const Block key =
      rows_as_floats(p.a.path_key.at(b, g, position), p.a.path_key.stride[3], key0, n, p.P, p, tile.spare_key);
  gemm<Start::add, Layout::columns>(
      to - from, channels,
      {tile.d_score + from, kRows, key.data, key.stride, tile.d_query + from * p.padded_D, p.padded_D, n});
}

template <class E>
void own_gradients(const Problem<E>& p, const ThoughtAttentionBackward<E>& a, int64_t b, int64_t g,
                   int64_t first_position, BackwardTile<E>& tile) {
  RowSet& set = tile.own;
  set = tile.text;
  set.see_own_path(p);
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min(kKeyBlock, set.end - key0);
    const auto score = [&](const float* lanes, const auto& rows, const auto& keys, float* products) {
      score_own(
          p, set, lanes, [&](int r) { return rows.at(b, set.row[r].head, set.row[r].position, set.row[r].step); },
          [&](int r) { return keys.at(b, g, set.row[r].position); }, keys.stride[3], key0, n, tile.products, products);
    };
    score(tile.query_t, a.query, a.path_key, tile.score);
    score(tile.d_out_t, a.d_out, a.path_value, tile.d_score);
    differentiate<true>(set, key0, n, n, p.factor, p.a.scale, p.cap, tile.lse, tile.delta, tile.score, tile.d_score);
    for (int from = 0, to; from < set.rows; from = to) {
      to = set.position_end(from);
      own_position(p, b, g, from, to, key0, n, set.row[from].position - first_position, tile);
    }
  }
}

template <class E>
void write_query_gradient(const Problem<E>& p, const ThoughtAttentionBackward<E>& a, int64_t b,
                          const BackwardTile<E>& tile) {
  const RowSet& set = tile.text;
  from_lanes(set, p.D, tile.d_query_t, [&](int r, int64_t d, F text) {
    const Row& row = set.row[r];
    store_channels(a.d_query.at(b, row.head, row.position, row.step), d, p.D,
                   text + load(tile.d_query + r * p.padded_D + d));
  });
}

// Writes `rows` rows of floats, or of the sum of `terms` arrays that lie `apart` of each other.
template <class E>
void write_gradient(const Problem<E>& p, const float* from, int64_t rows, int64_t terms, int64_t apart, E* to,
                    int64_t stride) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < p.D; d += kLanes) {
      F sum{};
      for (int64_t term = 0; term < terms; ++term) sum += load(from + term * apart + i * p.padded_D + d);
      store_channels(to + i * stride, d, p.D, sum);
    }
}

// A chunk of whole positions: all of its rows, then its own keys' gradients. The chunk at `then` comes next, if it
// exists.
template <class E>
void chunk_gradients(const Problem<E>& p, const ThoughtAttentionBackward<E>& a, const PackedText<E>& text, int64_t b,
                     int64_t g, int64_t position, int64_t positions, int64_t then, BackwardTile<E>& tile) {
  const int64_t begin = position * p.group * p.Q, end = (position + positions) * p.group * p.Q;
  const int64_t path_size = positions * p.P * p.padded_D;
  tile.d_path_key = tile.path_memory.reserve(2 * path_size);
  tile.d_path_value = tile.d_path_key + path_size;
  std::fill_n(tile.d_path_key, 2 * path_size, 0.0f);
  for (int64_t flat = begin; flat < end; flat += kRows) {
    tile.text.see_text(p, b, g, flat, static_cast<int>(std::min<int64_t>(kRows, end - flat)));
    load_tile(p, a, b, tile);
    const bool last = flat + kRows >= end;
    const int64_t next = last ? then * p.group * p.Q : flat + kRows;
    plan_prefetch(p, a, b, g, next, std::clamp<int64_t>((last ? p.rows : end) - next, 0, kRows), tile);
    if constexpr (kPacked<E>)
      if (p.packed) packed_text_gradients(p, text, 0, tile);
    if (!p.packed) text_gradients(p, b, g, tile);
    own_gradients(p, a, b, g, position, tile);
    write_query_gradient(p, a, b, tile);
  }
  for (int64_t i = 0; i < positions; ++i) {
    const int64_t offset = i * p.P * p.padded_D, t = position + i;
    write_gradient(p, tile.d_path_key + offset, p.P, 1, 0, a.d_path_key.at(b, g, t), a.d_path_key.stride[3]);
    write_gradient(p, tile.d_path_value + offset, p.P, 1, 0, a.d_path_value.at(b, g, t), a.d_path_value.stride[3]);
  }
}

template <class E>
void pack_head(const Problem<E>& p, const PackedText<E>& text, int64_t head, float* spare) {
  const int64_t b = head / p.G, g = head % p.G;
  for (int64_t block = 0; block < text.blocks; ++block) {
    const int64_t key = block * kKeyBlock;
    text.pack_rows(p.a.text_key.at(b, g), p.a.text_key.stride[2], block, text.rows(0, 0, key), spare);
    text.pack_rows(p.a.text_value.at(b, g), p.a.text_value.stride[2], block, text.rows(0, 1, key), spare);
    text.pack_columns(p.a.text_key.at(b, g), p.a.text_key.stride[2], block, text.columns(0, 2, key), spare);
  }
}

}  // namespace

template <class E>
void thought_attention_backward(const ThoughtAttentionBackward<E>& a, int threads) {
  prefer_large_pages(a.d_query);
  prefer_large_pages(a.d_path_key);
  prefer_large_pages(a.d_path_value);
  const Problem<E> p{a};
  const int64_t heads = p.B * p.G, chunk = positions_a_chunk(p), chunks = (p.T + chunk - 1) / chunk;
  const int64_t shares = std::min(chunks, (kUnits + heads - 1) / heads), size = (p.S + kKeyBlock) * p.padded_D;
  static thread_local Scratch<float> partial_memory;
  float* const partial =
      partial_memory.reserve(shares > 1 ? 2 * heads * shares * size : 0);  // [heads][key, value][shares]
#pragma omp parallel num_threads(threads) if (heads * shares > 1)
  {
    BackwardTile<E>& tile = kept<BackwardTile<E>>();
    static thread_local Scratch<uint16_t> scratch;
    [[maybe_unused]] const TileUse use;
    PackedText<E> text{p, 3};
    if (p.packed) text.memory = scratch.reserve(text.matrices * text.matrix);
    tile.d_text_key = tile.text_memory.reserve(2 * size);
    tile.d_text_value = tile.d_text_key + size;
    int64_t packed_head = -1;
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < heads * shares; ++unit) {
      const int64_t head = unit / shares, b = head / p.G, g = head % p.G;
      std::fill_n(tile.d_text_key, 2 * size, 0.0f);
      if (p.packed && head != packed_head) pack_head(p, text, packed_head = head, tile.spare_key);
      for (int64_t i = unit % shares; i < chunks; i += shares)
        chunk_gradients(p, a, text, b, g, i * chunk, std::min(chunk, p.T - i * chunk), (i + shares) * chunk, tile);
      if (shares > 1) {
        float* to = partial + (2 * head * shares + unit % shares) * size;
        std::copy_n(tile.d_text_key, size, to);
        std::copy_n(tile.d_text_value, size, to + shares * size);
      } else {
        write_gradient(p, tile.d_text_key, p.S, 1, 0, a.d_text_key.at(b, g), a.d_text_key.stride[2]);
        write_gradient(p, tile.d_text_value, p.S, 1, 0, a.d_text_value.at(b, g), a.d_text_value.stride[2]);
      }
    }
    if (shares > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < 2 * heads; ++i) {
        const int64_t b = i / 2 / p.G, g = i / 2 % p.G;
        const View<E, 4>& to = i % 2 ? a.d_text_value : a.d_text_key;
        write_gradient(p, partial + i * shares * size, p.S, shares, size, to.at(b, g), to.stride[2]);
      }
    }
    scratch.trim();
    tile.text_memory.trim();
    tile.path_memory.trim();
  }
  partial_memory.trim();
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
