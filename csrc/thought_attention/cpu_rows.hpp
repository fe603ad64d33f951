// The rows of thought attention on a CPU: how they are numbered, which keys they see, and how a block of keys is
// scored.
//
// A row is (position, head of the group, query step) of one (b, g). Rows are worked on in tiles of 48 or 64 whose text
// limits are nearly equal; inside a tile the SIMD lanes are rows, and scores stand as [key][row].
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "../common/gemm.hpp"
#include "../common/packed.hpp"
#include "../common/pages.hpp"
#include "contract.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

constexpr int kRows = kHasTiles ? 64 : 48;  // rows of a tile: a multiple of 3 vectors, or of the depth of tiles
constexpr int kKeyBlock = 64;               // keys between two rescalings
constexpr int kMaxD = 256;

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E>
struct Problem {
  const ThoughtInputs<E>& a;
  int64_t B = a.query.shape[0], H = a.query.shape[1], T = a.query.shape[2], Q = a.query.shape[3];
  int64_t D = a.query.shape[4], G = a.text_key.shape[1], S = a.text_key.shape[2], P = a.path_key.shape[3];
  int64_t group = H / G, rows = T * group * Q;
  int64_t padded_D = rounded_up(D, kLanes);
  // Scores are kept in base 2; with a softcap the factor before tanh and the one after it are
  // apart.
  float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
  float cap = a.softcap > 0 ? a.softcap * kLog2E : 0.0f;
  // Packing the text pays where several tiles share it.
  bool packed = kPacked<E> && rows > 2 * kRows;
};

struct Row {
  int64_t head, position, step;
};

// Row `flat` of a (b, g) counts steps fastest, then the heads of the group, then positions. Calls use(r, n, row) for
// each run of n rows flat + r .. that differ in nothing but the step, of `count` rows in all; row is the first of them.
template <class E, class Use>
void for_each_run(const Problem<E>& p, int64_t g, int64_t flat, int64_t count, Use use) {
  int64_t step = flat % p.Q, head = flat / p.Q % p.group, position = flat / (p.Q * p.group);
  for (int64_t r = 0, n; r < count; r += n) {
    n = std::min(p.Q - step, count - r);
    use(static_cast<int>(r), static_cast<int>(n), Row{g * p.group + head, position, step});
    step = 0;
    if (++head == p.group) head = 0, ++position;
  }
}

// Memory that a thread keeps from call to call, so that the system need not hand out and clear its pages each time. Not
// initialised; it begins at a cache line.
template <class T>
class Scratch {
 public:
  T* reserve(int64_t size) {
    if (size > size_) {
      memory_.reset();
      memory_.reset(static_cast<T*>(::operator new(size * sizeof(T), kLine)));
      size_ = size;
    }
    return memory_.get();
  }
  void trim() {
    constexpr int64_t kKept = (int64_t{32} << 20) / sizeof(T);
    if (size_ > kKept) memory_.reset(), size_ = 0;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kLine); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t size_ = 0;
};

// What a thread keeps from call to call. Not inlined: the compiler would ask for its address again and again, which is
// a call, in the innermost loops.
template <class T>
__attribute__((noinline)) T& kept() {
  static thread_local T one;
  return one;
}

// The rows of a tile and the keys each of them sees, of the text or of the own path: first <= key < limit.
struct RowSet {
  int rows = 0, vectors = 0;
  int64_t flat = 0;  // the first row's number
  Row row[kRows];
  alignas(64) int32_t first[kRows], limit[kRows];
  // Over all rows: keys before `begin` or from `end` on are seen by none, those from `all_from` to `all_to` by all.
  int32_t begin = 0, all_from = 0, all_to = 0, end = 0;

  bool masked(int32_t key0, int n) const { return key0 < all_from || key0 + n > all_to; }

  // Rows r .. position_end(r) belong to one position.
  int position_end(int r) const {
    int end = r + 1;
    while (end < rows && row[end].position == row[r].position) ++end;
    return end;
  }

  // Completes first and limit: lanes that nobody reads do as the last row does, and so ask for no further keys.
  void close() {
    std::fill(first + rows, first + kRows, first[rows - 1]);
    std::fill(limit + rows, limit + kRows, limit[rows - 1]);
    begin = *std::min_element(first, first + kRows);
    all_from = *std::max_element(first, first + kRows);
    all_to = *std::min_element(limit, limit + kRows);
    end = *std::max_element(limit, limit + kRows);
  }

  template <class E>
  void see_text(const Problem<E>& p, int64_t b, int64_t g, int64_t flat, int count) {
    const int64_t start = p.a.text_start ? *p.a.text_start.at(b) : 0;
    rows = count;
    this->flat = flat;
    vectors = p.packed ? kRows / kLanes : (count + kLanes - 1) / kLanes;
    for_each_run(p, g, flat, count, [&](int r, int n, Row at) {
      const int64_t to = *p.a.text_limits.at(b, at.position);
      for (const int run = r + n; r < run; ++r, ++at.step) {
        int64_t from = start;
        if (p.a.window > 0) from = std::max(from, to + p.P - p.Q + at.step - p.a.window + 1);
        row[r] = at;
        first[r] = static_cast<int32_t>(std::min(from, to));
        limit[r] = static_cast<int32_t>(to);
      }
    });
    close();
  }

  template <class E>
  void see_own_path(const Problem<E>& p) {
    for (int r = 0; r < rows; ++r) {
      const int64_t to = p.P - p.Q + row[r].step + 1;
      limit[r] = static_cast<int32_t>(to);
      first[r] = static_cast<int32_t>(p.a.window > 0 ? std::max<int64_t>(0, to - p.a.window) : 0);
    }
    close();
  }
};

// lanes[d * kRows + r] = row_of(r)[d]; lanes past the last row repeat it.
template <class RowOf>
void to_lanes(const RowSet& set, int64_t D, RowOf row_of, float* lanes) {
  for (int r = 0; r < set.vectors * kLanes; r += kLanes) {
    const auto row = [&](int i) { return row_of(std::min(r + i, set.rows - 1)); };
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      F block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(row(i) + d);
      transpose<kLanes>(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(lanes + (d + i) * kRows + r, block[i]);
    }
    for (; d < D; ++d)
      for (int i = 0; i < kLanes; ++i) lanes[d * kRows + r + i] = to_float(row(i)[d]);
  }
}

// Hands over(r, d, x) the vectors x of channels of row r that lanes[d * kRows + r] holds.
template <class Take>
void from_lanes(const RowSet& set, int64_t D, const float* lanes, Take take) {
  for (int r = 0; r < set.rows; r += kLanes)
    for (int64_t d = 0; d < D; d += kLanes) {
      F block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) block[i] = load(lanes + (d + i) * kRows + r);
      transpose<kLanes>(block);
      const int rows = std::min(kLanes, set.rows - r);
      for (int i = 0; i < rows; ++i) take(r + i, d, block[i]);
    }
}

// Writes channels d .. of a row: a whole vector, or the half that is left of it.
template <class E>
void store_channels(E* row, int64_t d, int64_t D, F x) {
  if (d + kLanes <= D) {
    store(row + d, x);
  } else {
    HalfF half;
    std::memcpy(&half, &x, sizeof half);
    store(row + d, half);
  }
}

// A row of D elements as floats, followed by zeros up to `padded`.
template <class E>
void copy_row(const E* from, int64_t D, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(to + d, load(from + d));
  if (d < D) store(to + d, load<HalfF>(from + d));
  std::fill(to + D, to + padded, 0.0f);
}

// Rows of keys or values as floats.
struct Block {
  const float* data;
  int64_t stride;
};

constexpr int rounded_keys(int n) { return static_cast<int>(rounded_up(n, kGemmRows)); }

// Rows `first` .. first + n of an array of `length` rows, where they lie if they are floats and at least
// rounded_keys(n) of them; else copied to `spare` [kKeyBlock][padded_D] and completed with zeros.
template <class E>
Block rows_as_floats(const E* array, int64_t stride, int64_t first, int n, int64_t length, const Problem<E>& p,
                     float* spare) {
  if constexpr (sizeof(E) == sizeof(float))
    if (first + rounded_keys(n) <= length && p.D == p.padded_D) return {array + first * stride, stride};
  for (int i = 0; i < n; ++i) copy_row(array + (first + i) * stride, p.D, p.padded_D, spare + i * p.padded_D);
  std::fill(spare + n * p.padded_D, spare + rounded_keys(n) * p.padded_D, 0.0f);
  return {spare, p.padded_D};
}

// Rows of memory that are touched only once, later on. They are asked for a few at a time between pieces of arithmetic:
// a core waits for its 16 or so open requests, so a long series of them would stall it.
template <class E>
struct Prefetch {
  static constexpr int kMost = 768;
  const E* row[kMost];
  int to_write = 0, count = 0, done = 0, quota = 0;  // the first `to_write` rows will be written

  void clear() { to_write = count = done = 0; }

  void add(const E* first, int64_t stride, int64_t rows) {
    for (rows = std::min<int64_t>(rows, kMost - count); rows > 0; --rows, first += stride) row[count++] = first;
  }

  // Spreads what is queued over so many calls of some().
  void spread(int64_t calls) { quota = static_cast<int>((count + calls - 1) / std::max<int64_t>(calls, 1)); }

  // Inlined by force: the compiler takes a function that only prefetches for one without effect and drops the call.
  __attribute__((always_inline)) void some(int64_t D) {
    constexpr int64_t kLine = 64 / sizeof(E);
    for (const int until = std::min(count, done + quota); done < until; ++done) {
      const E* p = row[done];
      if (done < to_write) {
        for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(p + d, 1, 2);
      } else {
        for (int64_t d = 0; d < D; d += kLine) __builtin_prefetch(p + d, 0, 2);
      }
    }
  }
};

// The last D % kLanes channels of a row, followed by zeros.
template <class E>
F load_half(const E* row) {
  const HalfF half = load<HalfF>(row);
  F whole{};
  std::memcpy(&whole, &half, sizeof half);
  return whole;
}

// Products of a query with four keys, lanes = channels: still to be summed over the lanes.
struct Products {
  F of[4];
};

template <class E>
__attribute__((always_inline)) inline Products multiply_keys(const E* query, const E* const key[4], int64_t D) {
  F sum[4] = {};
  const auto products = [&] { return Products{{sum[0], sum[1], sum[2], sum[3]}}; };
#if defined(__AVX512BF16__)
  if constexpr (sizeof(E) == 2) {  // pairs need no conversion
    for (int64_t d = 0; d < D; d += 32) {
      const __mmask32 some = D - d >= 32 ? 0xffffffff : (1u << (D - d)) - 1;
      const __m512bh q = (__m512bh)_mm512_maskz_loadu_epi16(some, query + d);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        sum[j] = (F)_mm512_dpbf16_ps((__m512)sum[j], q, (__m512bh)_mm512_maskz_loadu_epi16(some, key[j] + d));
    }
    return products();
  }
#endif
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    const F q = load(query + d);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] += q * load(key[j] + d);
  }
  if (d == D) return products();
  const F q = load_half(query + d);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sum[j] += q * load_half(key[j] + d);
  return products();
}

inline F4 totals(const Products& p) { return sum4(p.of[0], p.of[1], p.of[2], p.of[3]); }

// x . y, lanes = channels.
template <class E>
float dot(const E* x, const E* y, int64_t D) {
  F sum{};
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) sum += load(x + d) * load(y + d);
  if (d < D) sum += load_half(x + d) * load_half(y + d);
  return sum4(sum, F{}, F{}, F{})[0];
}

// Calls use(j, query . key_j, still in lanes) for begin <= j < end, four by four; where there are fewer, the first of
// them stands in.
template <class E, class Use>
__attribute__((always_inline)) inline void multiply_row(const E* query, const E* key, int64_t stride, int begin,
                                                        int end, int64_t D, Use use) {
  for (int j = begin; j < end; j += 4) {
    const E* first = key + j * stride;
    const int64_t more = end - j;
    const E* four[4] = {first, more > 1 ? first + stride : first, more > 2 ? first + 2 * stride : first,
                        more > 3 ? first + 3 * stride : first};
    use(j, static_cast<int>(std::min<int64_t>(4, more)), multiply_keys(query, four, D));
  }
}

// Room for the products of a vector of rows with some keys before they are summed.
struct RowProducts {
  static constexpr int kKeys = 8;
  F sum[kKeys][kLanes];
};

// score[j][r] = query_of(r) . key_j of key_of(r), of the keys key0 .. key0 + n those that row r sees; others are left
// as they come. Where a vector of rows is at least half full, its sums over lanes are made together.
template <class QueryOf, class KeyOf>
void score_rows(const RowSet& set, QueryOf query_of, KeyOf key_of, int64_t stride, int32_t key0, int n, int64_t D,
                RowProducts& products, float* score) {
  for (int r0 = 0; r0 < set.rows; r0 += kLanes) {
    const int rows = std::min(kLanes, set.rows - r0);
    if (2 * rows < kLanes) {
      for (int r = r0; r < set.rows; ++r)
        multiply_row(query_of(r), key_of(r) + key0 * stride, stride, std::max(set.first[r] - key0, 0),
                     std::min(set.limit[r] - key0, n), D, [&](int j, int count, const Products& lanes) {
                       const F4 four = totals(lanes);
                       for (int i = 0; i < count; ++i) score[(j + i) * kRows + r] = four[i];
                     });
      continue;
    }
    for (int j0 = 0; j0 < n; j0 += RowProducts::kKeys) {
      const int keys = std::min(RowProducts::kKeys, n - j0);
      for (int i = 0; i < rows; ++i) {
        const int r = r0 + i;
        multiply_row(query_of(r), key_of(r) + (key0 + j0) * stride, stride, std::max(set.first[r] - key0 - j0, 0),
                     std::min(set.limit[r] - key0 - j0, keys), D, [&](int j, int count, const Products& four) {
                       for (int k = 0; k < count; ++k) products.sum[j + k][i] = four.of[k];
                     });
      }
      for (int j = 0; j < keys; ++j) {
        F sum[kLanes];
        std::copy_n(products.sum[j], kLanes, sum);
        store(score + (j0 + j) * kRows + r0, sum_rows(sum));
      }
    }
  }
}

// Where rows lie in lanes, [D][kRows]: score[j][r] of M keys and the rows from .. to of a vector, whose other rows keep
// what they have.
template <int M>
void score_lanes(const float* lanes, const float* key, int64_t stride, int64_t D, int from, int to, float* score) {
  F sum[M] = {};
  for (int64_t d = 0; d < D; ++d) {
    const F x = load(lanes + d * kRows);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m] += fill(key[d + m * stride]) * x;
  }
  I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const I mine = (lane >= from) & (lane < to);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) store(score + m * kRows, mine ? sum[m] : load(score + m * kRows));
}

// The same of n keys and all rows, position by position.
template <class KeyOf>
void score_lanes(const RowSet& set, const float* lanes, KeyOf key_of, int64_t stride, int32_t key0, int n, int64_t D,
                 float* score) {
  for (int r0 = 0; r0 < set.rows; r0 += kLanes)
    for (int from = r0, to; from < std::min(r0 + kLanes, set.rows); from = to) {
      to = std::min(set.position_end(from), r0 + kLanes);
      const float* key = key_of(from) + key0 * stride;
      int j = 0;
      const auto keys = [&](auto count) {
        score_lanes<count>(lanes + r0, key + j * stride, stride, D, from - r0, to - r0, score + j * kRows + r0);
        j += count;
      };
      while (n - j >= 8) keys(std::integral_constant<int, 8>{});
      while (n - j >= 4) keys(std::integral_constant<int, 4>{});
      while (n - j >= 1) keys(std::integral_constant<int, 1>{});
    }
}

// As score_rows, by lanes where the queries lie in them too and a position has rows for most of a vector.
template <class E, class QueryOf, class KeyOf>
void score_own(const Problem<E>& p, const RowSet& set, const float* lanes, QueryOf query_of, KeyOf key_of,
               int64_t stride, int32_t key0, int n, RowProducts& products, float* score) {
  if constexpr (sizeof(E) == sizeof(float))
    if (lanes && p.group * p.Q >= 8) return score_lanes(set, lanes, key_of, stride, key0, n, p.D, score);
  score_rows(set, query_of, key_of, stride, key0, n, p.D, products, score);
}

}  // namespace
}  // namespace PYQUIET_ISA
}  // namespace pyquiet
