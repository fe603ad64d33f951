// What one thread keeps while it works on a tile of rows: the packed operands, the state of the online softmax and the
// list of memory to ask for ahead.
#pragma once

#include <algorithm>

#include "../common/simd.hpp"
#include "contract.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {
namespace {

constexpr int kRows = 48;      // rows of a tile: a multiple of 3 vectors, of 6 rows and of 4
constexpr int kKeyBlock = 64;  // keys between two rescalings
constexpr int kKeysAtOnce = kRegisters == 32 ? 8 : 4;
constexpr int kMaxD = 256;

struct Row {
  const float* query;
  int64_t head, position, step;
};

// Rows of memory that are touched only once, later on. They are asked for a few at a time between pieces of arithmetic:
// a core waits for its 16 or so open requests, so a long series of them would stall it.
struct Prefetch {
  const float* row[256];
  int to_write = 0, count = 0, done = 0, quota = 0;  // the first `to_write` rows will be written

  void add(const float* p) {
    if (count < 256) row[count++] = p;
  }

  // Inlined by force: the compiler takes a function that only prefetches for one without effect and drops the call.
  __attribute__((always_inline)) void some(int64_t D) {
    for (const int until = std::min(count, done + quota); done < until; ++done) {
      const float* p = row[done];
      if (done < to_write) {
        for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(p + d, 1, 2);
      } else {
        for (int64_t d = 0; d < D; d += 16) __builtin_prefetch(p + d, 0, 2);
      }
    }
  }
};

// What one thread keeps for the tile it works on.
struct Tile {
  int64_t D;
  int rows = 0, vectors = 0;
  alignas(64) float query_t[kMaxD * kRows];      // [D][kRows]
  alignas(64) float out[kRows * kMaxD];          // [kRows][D]
  alignas(64) float score[kKeyBlock * kRows];    // [key][row]
  alignas(64) float spare[kKeysAtOnce * kMaxD];  // the last few keys, padded to a whole group
  alignas(64) float max[kRows], sum[kRows], rescale[kRows];
  alignas(64) int32_t first[kRows], limit[kRows];  // row sees the text keys first <= s < limit
  Row row[kRows];
  // Over all rows: keys before `begin` or from `end` on are seen by none, those from `all_from` to `all_to` by all.
  int32_t begin = 0, all_from = 0, all_to = 0, end = 0;
  Prefetch prefetch;

  // Completes first and limit: lanes that nobody reads do as the last row does, and so ask for no further keys.
  void close_rows() {
    std::fill(first + rows, first + kRows, first[rows - 1]);
    std::fill(limit + rows, limit + kRows, limit[rows - 1]);
    begin = all_from = first[0];
    all_to = end = limit[0];
    for (int r = 0; r < kRows; ++r) {
      begin = std::min(begin, first[r]);
      all_from = std::max(all_from, first[r]);
      all_to = std::min(all_to, limit[r]);
      end = std::max(end, limit[r]);
    }
  }
};

struct Problem {
  const ThoughtAttention& a;
  int64_t B = a.query.shape[0], H = a.query.shape[1], T = a.query.shape[2], Q = a.query.shape[3];
  int64_t D = a.query.shape[4], G = a.text_key.shape[1], S = a.text_key.shape[2], P = a.path_key.shape[3];
  int64_t group = H / G, rows = T * group * Q, tiles = (rows + kRows - 1) / kRows;
  // Scores are kept in base 2; with a softcap the factor before tanh and the one after it are
  // apart.
  float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
  float cap = a.softcap > 0 ? a.softcap * kLog2E : 0.0f;

  int64_t first_row(int64_t item) const { return (tiles - 1 - item % tiles) * kRows; }
};

// Row `flat` of a (b, g) counts steps fastest, then the heads of the group, then positions; next() goes to the one
// after without a division.
struct RowCursor {
  RowCursor(const Problem& p, int64_t b, int64_t g, int64_t flat)
      : p(p),
        b(b),
        first_head(g * p.group),
        step(flat % p.Q),
        head(flat / p.Q % p.group),
        position(flat / (p.Q * p.group)) {}

  Row row() const { return {p.a.query.at(b, first_head + head, position, step), first_head + head, position, step}; }

  void next() {
    if (++step < p.Q) return;
    step = 0;
    if (++head < p.group) return;
    head = 0;
    ++position;
  }

  const Problem& p;
  int64_t b, first_head, step, head, position;
};

}  // namespace
}  // namespace PYQUIET_ISA
}  // namespace pyquiet
