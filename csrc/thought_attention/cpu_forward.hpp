// Thought attention, forward, one instruction set.
//
// Text: for blocks of 64 keys, an online softmax in base 2 over
//   score[key][row] = K Q^T,   out_t[channel][row] = out_t * rescale[row] + V^T weight,
// both products with rows in the lanes, so that row maxima and sums need no horizontal step and a key is masked lane by
// lane (the ragged end costs single keys, not key blocks). K and V are read where they lie, whatever the strides.
//
// Own path: row by row, lanes = channels, a softmax of its own; both are merged by log-sum-exp when the row is written.
// So is the text when a (b, g) has too few rows to fill a vector, as in decoding. No atomics: a row belongs to one
// thread, results ignore the thread count.
#pragma once

#include <cmath>

#include "cpu_packed.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

// An online softmax of every row: maximum and sum so far, and what the sums before the last block are to be multiplied
// with.
struct Softmax {
  alignas(64) float max[kRows], sum[kRows], rescale[kRows];

  void clear() {
    std::fill_n(max, kRows, kNegInf);
    std::fill_n(sum, kRows, 0.0f);
  }
};

// What one thread keeps for the tile it works on.
template <class E>
struct ForwardTile {
  RowSet set;
  const E* query[kRows];
  E* out[kRows];
  Softmax text, own;
  bool text_in_lanes = false, own_begun = false;  // own_begun: own_out holds something
  alignas(64) float query_t[kMaxD * kRows];       // [D][kRows]
  alignas(64) float text_out_t[kMaxD * kRows];    // [D][kRows]
  alignas(64) float own_out[kRows * kMaxD];       // [kRows][padded_D]
  alignas(64) float score[kKeyBlock * kRows];     // [key][row]
  RowProducts products;
  alignas(64) float spare_key[2 * kKeyBlock * kMaxD], spare_value[kKeyBlock * kMaxD];
  // In packed form: right matrices, and the last keys of the values.
  alignas(64) uint16_t query_packed[kMaxD * kRows], weight_packed[kKeyBlock * kRows], spare_packed[kMaxD * kKeyBlock];
  Prefetch<E> prefetch;
};

// The keys of a block that all rows of a set see: inner <= j < outer. The others are masked row by row.
struct Seen {
  int inner, outer;

  Seen(const RowSet& set, int32_t key0, int n)
      : inner(std::clamp(set.all_from - key0, 0, n)), outer(std::clamp(set.all_to - key0, inner, n)) {}
};

// Hides the keys from .. to from the lanes r .. that do not see them.
inline void hide(const RowSet& set, int32_t key0, int from, int to, int r, float* score) {
  const I first = load_ints(set.first + r), limit = load_ints(set.limit + r);
  for (int j = from; j < to; ++j) {
    const F s = load(score + j * kRows);
    store(score + j * kRows, ((fill(key0 + j) >= first) & (fill(key0 + j) < limit)) ? s : fill(kNegInf));
  }
}

// The largest of n scores of each lane. In two chains, that one need not wait for the other.
inline F largest(const float* score, int n) {
  F even = load(score), odd = even;
  for (int j = 1; j + 1 < n; j += 2) {
    even = max(load(score + j * kRows), even);
    odd = max(load(score + (j + 1) * kRows), odd);
  }
  return max(load(score + (n - 1) * kRows), max(even, odd));
}

// One online-softmax step: max and sum move on, and write(r, seen, weight) takes the weights of a vector of rows:
// weight(j, masked) is that of key j, and what it returns is added to the sum. A row without a key so far has max -inf;
// 0 stands in for it, so that no -inf - -inf arises.
template <class E, class Write>
void softmax_block(const Problem<E>& p, const RowSet& set, int32_t key0, int n, float* scores, Softmax& softmax,
                   Write write) {
  const Seen seen(set, key0, n);
  // A cap, or a factor that turns the order round, comes before the largest score is looked for.
  const bool ahead = p.cap > 0 || p.factor <= 0;
  const float factor = ahead ? 1.0f : p.factor;
  for (int r = 0; r < set.vectors * kLanes; r += kLanes) {
    float* score = scores + r;
    if (ahead)
      for (int j = 0; j < n; ++j) {
        const F s = load(score + j * kRows) * p.factor;
        store(score + j * kRows, p.cap > 0 ? tanh(s) * p.cap : s);
      }
    hide(set, key0, 0, seen.inner, r, score);
    hide(set, key0, seen.outer, n, r, score);
    const F top = largest(score, n);
    const F old_max = load(softmax.max + r), new_max = max(top == kNegInf ? top : top * factor, old_max);
    const F base = new_max == kNegInf ? F{} : new_max;
    const F rescale = exp2(old_max - base);
    const F sum = write(r, seen, [=](int j, bool masked) {
      const F s = load(score + j * kRows), weight = exp2(s * factor - base);
      return masked ? (s == kNegInf ? F{} : weight) : weight;
    });
    store(softmax.max + r, new_max);
    store(softmax.sum + r, load(softmax.sum + r) * rescale + sum);
    store(softmax.rescale + r, rescale);
  }
}

// The same; the weights take the scores' place.
template <class E>
void softmax_in_place(const Problem<E>& p, const RowSet& set, int32_t key0, int n, float* scores, Softmax& softmax) {
  softmax_block(p, set, key0, n, scores, softmax, [=](int r, const Seen& seen, auto weight) {
    F sum{};
    const auto keys = [&](int j, int end, bool masked) {
      for (; j < end; ++j) {
        const F x = weight(j, masked);
        store(scores + j * kRows + r, x);
        sum += x;
      }
    };
    keys(0, seen.inner, true);
    keys(seen.inner, seen.outer, false);
    keys(seen.outer, n, true);
    return sum;
  });
}

// The same; the weights are packed as a right matrix, completed with zeros up to `depth`.
template <class E>
void softmax_packed(const Problem<E>& p, const RowSet& set, int32_t key0, int n, int64_t depth, float* scores,
                    Softmax& softmax, const Packed& to) {
  softmax_block(p, set, key0, n, scores, softmax, [=](int r, const Seen& seen, auto weight) {
    F even{}, odd{};
    const auto pack = [&](int j, F x, F y) {
      const U bits = to_pairs(x, y);
      std::memcpy(to.data + j / 2 * to.stride + 2 * r, &bits, sizeof bits);
      even += x;
      odd += y;
    };
    int j = 0;
    for (; j < seen.inner; j += 2) pack(j, weight(j, true), j + 1 < n ? weight(j + 1, true) : F{});
    for (; j + 2 <= seen.outer; j += 2) pack(j, weight(j, false), weight(j + 1, false));
    for (; j < n; j += 2) pack(j, weight(j, true), j + 1 < n ? weight(j + 1, true) : F{});
    for (; j < depth; j += 2) pack(j, F{}, F{});
    return even + odd;
  });
}

// Queues what this tile reads and writes at its end, and the queries of the tile that this thread probably does next.
template <class E>
void plan_prefetch(const Problem<E>& p, int64_t b, int64_t g, int64_t next_b, int64_t next_g, int64_t next_begin,
                   ForwardTile<E>& tile) {
  Prefetch<E>& queue = tile.prefetch;
  const RowSet& set = tile.set;
  queue.clear();
  for (int r = 0; r < set.rows; ++r) queue.add(tile.out[r], 0, 1);
  queue.to_write = queue.count;
  if (next_begin >= 0)
    for_each_run(p, next_g, next_begin, std::min<int64_t>(kRows, p.rows - next_begin), [&](int, int n, const Row& row) {
      queue.add(p.a.query.at(next_b, row.head, row.position, row.step), p.a.query.stride[3], n);
    });
  for (int64_t t = set.row[0].position; t <= set.row[set.rows - 1].position; ++t) {
    queue.add(p.a.path_key.at(b, g, t), p.a.path_key.stride[3], p.P);
    queue.add(p.a.path_value.at(b, g, t), p.a.path_value.stride[3], p.P);
  }
  const int64_t span = set.end - set.begin, blocks = (span + kKeyBlock - 1) / kKeyBlock;
  const int64_t handful = p.packed && kHasTiles ? 32 : kGemmRows, handfuls = span / handful + blocks * p.D / handful;
  const int64_t calls = p.packed ? handfuls + 1 : handfuls * (p.D / kBetween) + 1;
  queue.spread(calls);
}

template <class E>
void attend_text(const Problem<E>& p, int64_t b, int64_t g, ForwardTile<E>& tile) {
  const RowSet& set = tile.set;
  const auto prefetch = [&] { tile.prefetch.some(p.D); };
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min<int32_t>(kKeyBlock, set.end - key0);
    const Block key = rows_as_floats(p.a.text_key.at(b, g), p.a.text_key.stride[2], key0, n, p.S, p, tile.spare_key);
    gemm<Start::zero, Layout::rows>(rounded_keys(n), set.vectors,
                                    {key.data, key.stride, tile.query_t, kRows, tile.score, kRows, p.D}, prefetch);
    softmax_in_place(p, set, key0, n, tile.score, tile.text);
    const Block value =
        rows_as_floats(p.a.text_value.at(b, g), p.a.text_value.stride[2], key0, n, p.S, p, tile.spare_value);
    const GemmOperands out{value.data, value.stride, tile.score, kRows, tile.text_out_t, kRows, n, tile.text.rescale};
    if (key0 == set.begin) {
      gemm<Start::zero, Layout::columns>(p.D, set.vectors, out, prefetch);
    } else {
      gemm<Start::rescale, Layout::columns>(p.D, set.vectors, out, prefetch);
    }
  }
}

// The same with the text's packed keys and values.
template <class E>
void attend_packed_text(const Problem<E>& p, const PackedText<E>& text, int64_t slot, ForwardTile<E>& tile) {
  constexpr int kVectors = kRows / kLanes;
  const RowSet& set = tile.set;
  const Packed query{tile.query_packed, 2 * kRows}, weight{tile.weight_packed, 2 * kRows};
  pack_right(tile.query_t, kRows, p.D, text.width, kVectors, query);
  const auto prefetch = [&] { tile.prefetch.some(p.D); };
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min<int32_t>(kKeyBlock, set.end - key0);
    packed_gemm<Start::zero>(n, kRows, text.width, text.rows(slot, 0, key0), query, tile.score, kRows, nullptr,
                             prefetch);
    const int64_t depth = rounded_up(n, kDepth);
    softmax_packed(p, set, key0, n, depth, tile.score, tile.text, weight);
    const Packed value = whole_depth(text.columns(slot, 1, key0), text.width, n, tile.spare_packed);
    const auto add = key0 == set.begin ? packed_gemm<Start::zero, decltype(prefetch)>
                                       : packed_gemm<Start::rescale, decltype(prefetch)>;
    add(p.D, kRows, depth, value, weight, tile.text_out_t, kRows, tile.text.rescale, prefetch);
  }
}

// out[0 .. D) = (Begun ? out * rescale : 0) + sum_j score[j * kRows] * value_j for begin <= j < end, lanes = channels.
template <bool Begun, class E>
void add_row_values(const float* score, float rescale, const E* value, int64_t stride, int begin, int end, int64_t D,
                    float* out) {
  const auto vectors = [&](auto tag, auto count, int64_t d) {
    using V = decltype(tag);
    constexpr int kCount = decltype(count)::value;
    V sum[kCount] = {};
    if constexpr (Begun) {
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sum[v] = load<V>(out + d + v * kWidth<V>) * rescale;
    }
    for (int j = begin; j < end; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sum[v] += score[j * kRows] * load<V>(value + j * stride + d + v * kWidth<V>);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) store(out + d + v * kWidth<V>, sum[v]);
  };
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) vectors(F{}, std::integral_constant<int, 4>{}, d);
  for (; d + kLanes <= D; d += kLanes) vectors(F{}, std::integral_constant<int, 1>{}, d);
  if (d < D) vectors(HalfF{}, std::integral_constant<int, 1>{}, d);
}

// The keys that each row sees of an array of its own (key_of(r), value_of(r)), row by row; only the softmax goes over
// the rows together.
template <class E, class KeyOf, class ValueOf>
void attend_by_row(const Problem<E>& p, KeyOf key_of, int64_t key_stride, ValueOf value_of, int64_t value_stride,
                   ForwardTile<E>& tile) {
  const RowSet& set = tile.set;
  const auto query_of = [&](int r) { return tile.query[r]; };
  for (int32_t key0 = set.begin; key0 < set.end; key0 += kKeyBlock) {
    const int n = std::min(kKeyBlock, set.end - key0);
    score_own(p, set, tile.text_in_lanes ? tile.query_t : nullptr, query_of, key_of, key_stride, key0, n, tile.products,
              tile.score);
    softmax_in_place(p, set, key0, n, tile.score, tile.own);
    const auto add = tile.own_begun ? add_row_values<true, E> : add_row_values<false, E>;
    for (int r = 0; r < set.rows; ++r)
      add(tile.score + r, tile.own.rescale[r], value_of(r) + key0 * value_stride, value_stride,
          std::max(set.first[r] - key0, 0), std::min(set.limit[r] - key0, n), p.D, tile.own_out + r * p.padded_D);
    tile.own_begun = true;
  }
}

template <class E>
void attend_text_by_row(const Problem<E>& p, int64_t b, int64_t g, ForwardTile<E>& tile) {
  attend_by_row(
      p, [&](int) { return p.a.text_key.at(b, g); }, p.a.text_key.stride[2],
      [&](int) { return p.a.text_value.at(b, g); }, p.a.text_value.stride[2], tile);
}

template <class E>
void attend_own_path(const Problem<E>& p, int64_t b, int64_t g, ForwardTile<E>& tile) {
  const RowSet& set = tile.set;
  tile.set.see_own_path(p);
  attend_by_row(
      p, [&](int r) { return p.a.path_key.at(b, g, set.row[r].position); }, p.a.path_key.stride[3],
      [&](int r) { return p.a.path_value.at(b, g, set.row[r].position); }, p.a.path_value.stride[3], tile);
}

// Merges the two softmaxes: rescale becomes what each one's sums are to be multiplied with, sum the sum of both.
void merge(int vectors, Softmax& text, Softmax& own) {
  for (int r = 0; r < vectors * kLanes; r += kLanes) {
    const F text_max = load(text.max + r), own_max = load(own.max + r), top = max(text_max, own_max);
    const F text_part = text_max == kNegInf ? F{} : exp2(text_max - top), own_part = exp2(own_max - top);
    const F sum = load(text.sum + r) * text_part + load(own.sum + r) * own_part;
    store(text.rescale + r, text_part / sum);
    store(own.rescale + r, own_part / sum);
    store(own.sum + r, sum);
    store(own.max + r, top);
  }
}

template <class E>
void write_rows(const Problem<E>& p, const ThoughtAttention<E>& a, int64_t b, ForwardTile<E>& tile) {
  const RowSet& set = tile.set;
  merge(set.vectors, tile.text, tile.own);
  const auto write = [&](int r, int64_t d, F text) {
    store_channels(tile.out[r], d, p.D,
                   text * tile.text.rescale[r] + load(tile.own_out + r * p.padded_D + d) * tile.own.rescale[r]);
  };
  if (tile.text_in_lanes) {
    from_lanes(set, p.D, tile.text_out_t, write);
  } else {
    for (int r = 0; r < set.rows; ++r)
      for (int64_t d = 0; d < p.D; d += kLanes) write(r, d, F{});
  }
  if (!a.lse) return;
  for (int r = 0; r < set.rows; ++r)
    *a.lse.at(b, set.row[r].head, set.row[r].position, set.row[r].step) =
        kLn2 * (tile.own.max[r] + std::log2(tile.own.sum[r]));
}

// Items go through the heads one by one, in each from the longest prefix to the shortest.
struct Items {
  int64_t tiles, items;

  template <class E>
  explicit Items(const Problem<E>& p) : tiles((p.rows + kRows - 1) / kRows), items(p.B * p.G * tiles) {}

  int64_t head(int64_t item) const { return item / tiles; }
  int64_t first_row(int64_t item) const { return (tiles - 1 - item % tiles) * kRows; }
};

template <class E>
void attend_item(const Problem<E>& p, const ThoughtAttention<E>& a, const PackedText<E>& text, int64_t slot,
                 const Items& items, int64_t item, int64_t next, ForwardTile<E>& tile) {
  const int64_t head = items.head(item), b = head / p.G, g = head % p.G, flat = items.first_row(item);
  tile.set.see_text(p, b, g, flat, static_cast<int>(std::min<int64_t>(kRows, p.rows - flat)));
  for_each_run(p, g, flat, tile.set.rows, [&](int r, int n, const Row& row) {
    const E* query = p.a.query.at(b, row.head, row.position, row.step);
    E* out = a.out.at(b, row.head, row.position, row.step);
    for (int i = 0; i < n; ++i)
      tile.query[r + i] = query + i * p.a.query.stride[3], tile.out[r + i] = out + i * a.out.stride[3];
  });
  tile.text.clear();
  tile.own.clear();
  tile.own_begun = false;
  tile.text_in_lanes = tile.set.rows * 2 >= kLanes && tile.set.begin < tile.set.end;
  if (tile.text_in_lanes) {
    const int64_t next_head = items.head(next);
    plan_prefetch(p, b, g, next_head / p.G, next_head % p.G, next < items.items ? items.first_row(next) : -1, tile);
    to_lanes(tile.set, p.D, [&](int r) { return tile.query[r]; }, tile.query_t);
    if constexpr (kPacked<E>)
      if (p.packed) attend_packed_text(p, text, slot, tile);
    if (!p.packed) attend_text(p, b, g, tile);
  } else {
    attend_text_by_row(p, b, g, tile);
  }
  attend_own_path(p, b, g, tile);
  write_rows(p, a, b, tile);
}

template <class E>
void pack_block(const Problem<E>& p, const PackedText<E>& text, int64_t head, int64_t slot, int64_t block,
                float* spare) {
  const int64_t b = head / p.G, g = head % p.G, key = block * kKeyBlock;
  text.pack_rows(p.a.text_key.at(b, g), p.a.text_key.stride[2], block, text.rows(slot, 0, key), spare);
  text.pack_columns(p.a.text_value.at(b, g), p.a.text_value.stride[2], block, text.columns(slot, 1, key), spare);
}

}  // namespace

template <class E>
void thought_attention_forward(const ThoughtAttention<E>& a, int threads) {
  prefer_large_pages(a.out);
  const Problem<E> p{a};
  const Items items(p);
  const int64_t heads = p.B * p.G;
  // A thread that packs a head for itself finds it in its own cache; few heads are packed by all threads together.
  const bool by_head = p.packed && heads >= 4 * threads;
  PackedText<E> shared{p, 2};
  static thread_local Scratch<uint16_t> scratch;
  if (p.packed && !by_head) shared.memory = scratch.reserve(heads * shared.matrices * shared.matrix);
#pragma omp parallel num_threads(threads) if (items.items > 1)
  {
    ForwardTile<E>& tile = kept<ForwardTile<E>>();
    [[maybe_unused]] const TileUse use;
    if (by_head) {
      static thread_local Scratch<uint16_t> own;  // declared where every thread comes by, or it would never be freed
      PackedText<E> text = shared;
      text.memory = own.reserve(text.matrices * text.matrix);
#pragma omp for schedule(dynamic)
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t block = 0; block < text.blocks; ++block) pack_block(p, text, head, 0, block, tile.spare_key);
        for (int64_t i = head * items.tiles; i < (head + 1) * items.tiles; ++i)
          attend_item(p, a, text, 0, items, i, i + 1, tile);
      }
      own.trim();
    } else {
      if (p.packed) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads * shared.blocks; ++i)
          pack_block(p, shared, i / shared.blocks, i / shared.blocks, i % shared.blocks, tile.spare_key);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < items.items; ++i) attend_item(p, a, shared, items.head(i), items, i, i + threads, tile);
    }
  }
  scratch.trim();
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
