// What the kernels of draft verification share, their argument and its rows; and the kernel that reduces rows, chunk by
// chunk.
#pragma once

#include "../common/cuda_rows.cuh"
#include "contract.hpp"

namespace pyquiet {

// A tensor [B], [B, rows] or [B, rows, V].
template <class T>
struct Rows {
  T* data;
  int64_t sequence, row;  // strides

  PYQUIET_DEVICE T* at(int64_t b, int64_t j = 0) const { return data + b * sequence + j * row; }
};

// Of a chunk of a row, or of the row.
struct Partial {
  float top;      // the largest score; +inf: the row has a fault
  float sum;      // of exp(score - top)
  uint64_t best;  // the largest ranked(score or noisy score, id)
};

// Of a row, in integers.
struct Exact {
  uint64_t total;  // of the weights that are kept
  uint64_t best;
  float top, threshold;
};

// Of a chunk of the row that a token is drawn from; W: double or uint64_t.
template <class W>
struct ChunkWeight {
  W residual, whole;
  bool fault, any;  // in the draft's row: NaN or +inf; an id that is left
};

template <class E>
struct Verify {
  Rows<const E> target, draft;
  Rows<const int64_t> draft_tokens, lengths;
  Rows<const float> draft_lse;
  Rows<int64_t> tokens, count, accepted, fault;
  Rows<float> log_probs;
  Rows<bool> bonus;
  Stream stream;
  Processing processing[2];  // of target and draft; at temperature 0 by 1, and `greedy`
  bool greedy[2];
  bool first_is_exact, gumbel, deterministic, bonus_row;
  bool rejection;    // neither gumbel nor greedy
  bool exact;        // Exact is made
  bool partial;      // Partials are made
  bool reads_draft;  // where they are, of the draft's rows too
  int32_t V, chunks;
  int64_t k, slots;   // slots: rows of the target, then of the draft, of a sequence
  Exact* exacts;      // [B, slots]
  Partial* partials;  // [B, slots, chunks]
  void* weights;      // [B, chunks] ChunkWeight
  uint32_t* arrived;  // [B], blocks that have written theirs

  // -1: out of range.
  PYQUIET_DEVICE int64_t length(int64_t b) const {
    const int64_t length = lengths.data ? *lengths.at(b) : k;
    return length >= 0 && length <= k ? length : -1;
  }
};

// One row of the grid that the reductions have: rows b * slots + slot.
template <class E>
struct Row {
  const E* logits;
  int64_t b, j, slot;
  bool of_draft, wanted;

  PYQUIET_DEVICE Row(const Verify<E>& a, unsigned row) {
    // Where the draft is not read, the grid has the target's rows alone.
    const auto rows = static_cast<unsigned>(a.reads_draft ? a.slots : a.slots - a.k);
    const int64_t targets = a.slots - a.k;
    b = row / rows;
    const int64_t in_sequence = row % rows;
    slot = b * a.slots + in_sequence;
    of_draft = in_sequence >= targets;
    j = of_draft ? in_sequence - targets : in_sequence;
    logits = of_draft ? a.draft.at(b, j) : a.target.at(b, j);
    const int64_t length = a.length(b);
    wanted = of_draft ? j < length && !(j == 0 && a.first_is_exact) : j < length + (a.bonus_row && length >= 0);
  }
};

template <class E>
struct ReduceShared {
  alignas(16) char staged[kStagedBytes<E>];
  float top[kWarps], sum[kWarps];
  uint64_t best[kWarps];
};

// Block: (row, chunk).
template <class E>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const __grid_constant__ Verify<E> a) {
  auto& s = *reinterpret_cast<ReduceShared<E>*>(shared_memory());
  const auto chunks = static_cast<unsigned>(a.chunks);
  const Row<E> row(a, blockIdx.x / chunks);
  const unsigned chunk = blockIdx.x % chunks;
  if (threadIdx.x == 0 && chunk == 0) a.arrived[row.b] = 0;
  if (!row.wanted) return;
  const int first = static_cast<int>(chunk) * kChunk, count = chunk_size(first, a.V);
  const E* staged = stage(row.logits, first, count, s.staged);
  const float threshold = a.exact ? a.exacts[row.slot].threshold : kNegInf;
  wait_copies();
  __syncthreads();
  const Processing& law = a.processing[row.of_draft];
  float score[kEach], top = kNegInf;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = 2 * (threadIdx.x + e / 2 * kThreads) + e % 2;
    score[e] = i < count ? law.score(staged[i], first + i, threshold) : kNegInf;
    top = fmaxf(top, fault_as_inf(score[e]));
  }
  top = fold_block<kWarps>(top, Largest{}, s.top);
  const float base = top == kNegInf ? 0.0f : top;
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) sum += exp_approximate(score[e] - base);
  sum = fold_block<kWarps>(sum, Add{}, s.sum);
  uint64_t best = 0;
  if (a.gumbel || a.greedy[row.of_draft]) {
#pragma unroll
    for (int pair = 0; pair < kEach / 2; ++pair) {
      const int id = first + 2 * (threadIdx.x + pair * kThreads);
      PhiloxBlock noise{};
      if (a.gumbel) {
        noise = a.stream.counter(row.b, row.j, kGumbel);
        noise.word[3] += static_cast<uint32_t>(id / 2);
        noise = philox(a.stream.seed, noise);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float value = score[2 * pair + half] + (a.gumbel ? gumbel_noise(noise, half) : 0.0f);
        best = Largest{}(best, id + half < a.V ? ranked(value, id + half) : 0);
      }
    }
    best = fold_block<kWarps>(best, Largest{}, s.best);
  }
  if (threadIdx.x == 0) a.partials[row.slot * a.chunks + chunk] = {top, sum, best};
}

}  // namespace pyquiet
