// The kernel that follows the drafts of a sequence to the first that is rejected, and draws what comes then.
//
// Block: (sequence, chunk). Every block goes through the accept tests, a row a warp, from what the reductions left, and
// weighs its chunk of the row where the sequence ends. The block that arrives last picks a chunk by these sums, in the
// chunk 64 ids, and of those one. Where nothing is drawn, chunk 0 has it all.
#pragma once

#include "cuda_rows.cuh"

namespace pyquiet {

// What is known of a row.
struct Law {
  float top, threshold, lse;
  int best;
  uint64_t total;
  double unit;
  bool greedy;

  PYQUIET_DEVICE bool valid() const { return top > kNegInf && top < kInf; }
};

// Of a row of a sequence.
struct Step {
  Law q, p;
  int64_t token;   // the draft if accepted, else what is known without drawing
  float log_prob;  // of `token`
  int fault;       // -1: a draft out of range; 1, 2: of the contract, at row 0
  bool accepted;
};

// By a warp.
template <class E>
PYQUIET_DEVICE Law law_of(const Verify<E>& a, int64_t b, int64_t row, bool of_draft) {
  const int64_t slot = b * a.slots + row + (of_draft ? a.slots - a.k : 0);
  Law law{kNegInf, kNegInf, 0.0f, 0, 0, 0.0, a.greedy[of_draft]};
  uint64_t best = 0;
  double sum = 0.0;
  if (a.exact) {
    const Exact& exact = a.exacts[slot];
    law.top = exact.top;
    law.threshold = exact.threshold;
    law.total = exact.total;
    law.unit = probability_unit(exact.total);
    best = exact.best;
    sum = static_cast<double>(exact.total) * 0x1p-40;
  }
  if (a.partial) {
    const Partial* parts = a.partials + slot * a.chunks;
    const int lane = threadIdx.x % 32;
    best = 0;
    for (int i = lane; i < a.chunks; i += 32) {
      law.top = fmaxf(law.top, parts[i].top);
      best = Largest{}(best, parts[i].best);
    }
    law.top = fold_warp(law.top, Largest{});
    best = fold_warp(best, Largest{});
    sum = 0.0;
    for (int i = lane; i < a.chunks; i += 32)
      if (parts[i].top > kNegInf) sum += static_cast<double>(parts[i].sum * exp_approximate(parts[i].top - law.top));
    sum = fold_warp(sum, Add{});
  }
  law.best = id_of(best);
  if (law.valid() && !law.greedy) law.lse = static_cast<float>(law.top + log(sum));
  return law;
}

// Probability of a score in units of 2^-62, and in logarithm.
PYQUIET_DEVICE int64_t fixed(const Law& law, float score, int64_t id) {
  if (law.greedy) return id == law.best ? int64_t{1} << 62 : 0;
  return fixed_probability(fixed_weight(score - law.top), law.unit);
}
PYQUIET_DEVICE float log_probability(const Law& law, float score, int64_t id) {
  return !law.greedy ? score - law.lse : id == law.best ? 0.0f : kNegInf;
}

// Whether draft d of row j, whose score and log-probability under the target are given, is accepted. By a warp.
template <class E>
PYQUIET_DEVICE bool accepted(const Verify<E>& a, int64_t b, int64_t j, int64_t d, float score, float log_q,
                             Step& step) {
  const bool by_lse = a.draft_lse.data && !a.deterministic;
  if (a.reads_draft) {
    step.p = law_of(a, b, j, true);
  } else {
    step.p = {0.0f, kNegInf, *a.draft_lse.at(b, j), 0, 0, 0.0, false};
  }
  const float own = a.processing[1].score(a.draft.at(b, j)[d], d, by_lse ? kNegInf : step.p.threshold);
  const double u = uniform(philox(a.stream.seed, a.stream.counter(b, j, kAccept)));
  bool accepted;
  if (a.deterministic) {
    accepted = accepts_fixed(u, fixed(step.q, score, d), fixed(step.p, own, d));
  } else if (by_lse) {
    const float log_p = step.p.greedy ? 0.0f : own - *a.draft_lse.at(b, j);
    accepted = accepts(u, log_q, log_p);
    if (log_p != log_p) step.fault = 2;
  } else {
    accepted = accepts(u, log_q, log_probability(step.p, own, d));
  }
  if (!step.p.valid() && !(by_lse && accepted)) step.fault = 2;
  return accepted;
}

// By a warp; row number `length` is the bonus.
template <class E>
PYQUIET_DEVICE Step examine(const Verify<E>& a, int64_t b, int64_t j, int64_t length) {
  Step step{};
  step.q = law_of(a, b, j, false);
  const bool is_draft = j < length, exact = is_draft && j == 0 && a.first_is_exact;
  const int64_t d = is_draft ? *a.draft_tokens.at(b, j) : 0;
  step.fault = d < 0 || d >= a.V ? -1 : !step.q.valid();
  if (step.fault) return step;
  step.token = a.rejection || exact ? d : step.q.best;
  const float score = a.processing[0].score(a.target.at(b, j)[step.token], step.token, step.q.threshold);
  step.log_prob = a.greedy[0] ? 0.0f : score - step.q.lse;
  if (exact) {
    step.accepted = true;
  } else if (is_draft) {
    step.accepted = a.rejection ? accepted(a, b, j, d, score, step.log_prob, step) : step.token == d;
    step.accepted &= step.fault == 0;
  }
  return step;
}

template <class E, class W>
struct DrawShared {
  alignas(16) char target[kStagedBytes<E>];
  alignas(16) char draft[kStagedBytes<E>];
  Step step[kWarps];
  W residual[kWarps], whole[kWarps], segment[kChunk / 64], left;
  int flags[kWarps];
  int chunk;
  bool from_residual, last;
};

// Follows the accept tests to the first row that does not end with an accepted draft, whose Step is then step[row %
// kWarps], or past the last. With `write`, what was accepted is written.
template <class E>
PYQUIET_DEVICE int64_t follow(const Verify<E>& a, int64_t b, int64_t length, Step* step, bool write) {
  const int64_t rows = length + a.bonus_row;
  const int warp = threadIdx.x / 32;
  for (int64_t first = 0; first < rows; first += kWarps) {
    if (first + warp < rows) {
      const Step own = examine(a, b, first + warp, length);
      if (threadIdx.x % 32 == 0) step[warp] = own;
    }
    __syncthreads();
    const int n = rows - first < kWarps ? static_cast<int>(rows - first) : kWarps;
    int stop = 0;
    while (stop < n && step[stop].accepted) ++stop;
    if (write && static_cast<int>(threadIdx.x) < stop) {
      *a.tokens.at(b, first + threadIdx.x) = step[threadIdx.x].token;
      *a.log_probs.at(b, first + threadIdx.x) = step[threadIdx.x].log_prob;
    }
    if (stop < n) return first + stop;
    __syncthreads();
  }
  return rows;
}

// Writes all that follows `accepted` drafts: a token, unless it is -1, and padding.
template <class E>
PYQUIET_DEVICE void finish(const Verify<E>& a, int64_t b, int64_t accepted, int64_t length, int64_t token,
                           float log_prob, int64_t fault) {
  for (int64_t j = accepted + threadIdx.x; j <= a.k; j += kThreads) {
    *a.tokens.at(b, j) = j == accepted ? token : -1;
    *a.log_probs.at(b, j) = j == accepted ? log_prob : 0.0f;
  }
  if (threadIdx.x != 0) return;
  *a.accepted.at(b) = accepted;
  *a.count.at(b) = accepted + (token >= 0);
  *a.bonus.at(b) = token >= 0 && accepted == length;
  *a.fault.at(b) = fault;
}

// Probabilities as their weights in W: of q alone, and of what q has above p. In integers, q is its weight.
template <class W>
struct Weigh {
  Law q, p;

  PYQUIET_DEVICE W whole(float score, int64_t) const { return exp_approximate(score - q.lse); }
  PYQUIET_DEVICE W residual(float score, float own, int64_t id) const {
    const float taken = !p.greedy ? exp_approximate(own - p.lse) : id == p.best ? 1.0f : 0.0f;
    return fmaxf(exp_approximate(score - q.lse) - taken, 0.0f);
  }
  PYQUIET_DEVICE static bool has_residual(W mass) { return mass > kNoResidual; }
  PYQUIET_DEVICE static W threshold(double u, W total) { return u * total; }
};
template <>
struct Weigh<uint64_t> {
  using W = uint64_t;
  Law q, p;

  PYQUIET_DEVICE W whole(float score, int64_t) const { return fixed_weight(score - q.top); }
  PYQUIET_DEVICE W residual(float score, float own, int64_t id) const {
    const int64_t rest = fixed(q, score, id) - fixed(p, own, id);
    return rest > 0 ? static_cast<W>(rest) : 0;
  }
  PYQUIET_DEVICE static bool has_residual(W mass) { return static_cast<double>(mass) * 0x1p-62 > kNoResidual; }
  PYQUIET_DEVICE static W threshold(double u, W total) { return cdf_threshold(u, total); }
};

// A chunk of the row where a sequence ends, staged.
template <class E, class W>
struct StagedChunk {
  const Verify<E>& a;
  Weigh<W> weigh;
  int first, count;
  const E *target, *draft;

  PYQUIET_DEVICE StagedChunk(const Verify<E>& a, int64_t b, int64_t j, const Step& step, bool with_draft, int chunk,
                             DrawShared<E, W>& s)
      : a(a), weigh{step.q, step.p}, first(chunk * kChunk), count(chunk_size(first, a.V)) {
    target = stage(a.target.at(b, j), first, count, s.target);
    draft = with_draft ? stage(a.draft.at(b, j), first, count, s.draft) : nullptr;
    wait_copies();
    __syncthreads();
  }
  PYQUIET_DEVICE float own(int i) const { return a.processing[1].score(draft[i], first + i, weigh.p.threshold); }
  PYQUIET_DEVICE W weight(int i, bool residual) const {
    if (i >= count) return 0;
    const float score = a.processing[0].score(target[i], first + i, weigh.q.threshold);
    return residual ? weigh.residual(score, own(i), first + i) : weigh.whole(score, first + i);
  }
};

template <class E, class W>
PYQUIET_DEVICE ChunkWeight<W> weigh_chunk(const StagedChunk<E, W>& chunk, DrawShared<E, W>& s) {
  W residual = 0, whole = 0;
  int flags = 0;
#pragma unroll 4
  for (int e = 0; e < kEach; ++e) {
    const int i = 2 * (static_cast<int>(threadIdx.x) + e / 2 * kThreads) + e % 2;
    whole += chunk.weight(i, false);
    if (!chunk.draft || i >= chunk.count) continue;
    residual += chunk.weight(i, true);
    const float own = fault_as_inf(chunk.own(i));
    flags |= (own == kInf) | (own > kNegInf) << 1;
  }
  residual = fold_block<kWarps>(residual, Add{}, s.residual);
  whole = fold_block<kWarps>(whole, Add{}, s.whole);
  flags = fold_block<kWarps>(flags, Either{}, s.flags);
  return {residual, whole, (flags & 1) != 0, (flags & 2) != 0};
}

// By the block that comes last: the token, and in `fault` whether the draft's row has one.
template <class E, class W>
PYQUIET_DEVICE int64_t draw(const Verify<E>& a, int64_t b, int64_t j, bool bonus, const Step& step, bool* fault,
                            DrawShared<E, W>& s) {
  const auto* weights = static_cast<const ChunkWeight<W>*>(a.weights) + b * a.chunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == 0) {
    W residual = 0, whole = 0;
    int flags = 0;
    for (int i = lane; i < a.chunks; i += 32) {
      residual += weights[i].residual;
      whole += weights[i].whole;
      flags |= weights[i].fault | weights[i].any << 1;
    }
    residual = fold_warp(residual, Add{});
    whole = fold_warp(whole, Add{});
    flags = fold_warp(flags, Either{});
    const bool from_residual = !bonus && Weigh<W>::has_residual(residual);
    const double u = uniform(philox(a.stream.seed, a.stream.counter(b, j, bonus ? kBonus : kResidual)));
    W left = Weigh<W>::threshold(u, from_residual ? residual : whole);
    const int chunk =
        pick(a.chunks, left, [&](int i) { return from_residual ? weights[i].residual : weights[i].whole; });
    if (lane == 0) {
      s.from_residual = from_residual;
      s.left = left;
      s.chunk = chunk;
      s.flags[0] = flags;
    }
  }
  __syncthreads();
  *fault = !bonus && s.flags[0] != 2;
  const StagedChunk<E, W> chunk(a, b, j, step, s.from_residual, s.chunk, s);
#pragma unroll 1
  for (int segment = warp; segment < kChunk / 64; segment += kWarps) {
    const int i = 64 * segment + 2 * lane;
    const W sum = fold_warp(chunk.weight(i, s.from_residual) + chunk.weight(i + 1, s.from_residual), Add{});
    if (lane == 0) s.segment[segment] = sum;
  }
  __syncthreads();
  W left = s.left;
  const int segment = pick(kChunk / 64, left, [&](int i) { return s.segment[i]; });
  return chunk.first + 64 * segment +
         pick(64, left, [&](int i) { return chunk.weight(64 * segment + i, s.from_residual); });
}

template <class E, class W>
__global__ void __launch_bounds__(kThreads, 4) draw_kernel(const __grid_constant__ Verify<E> a) {
  auto& s = *reinterpret_cast<DrawShared<E, W>*>(shared_memory());
  const unsigned chunks = a.rejection ? a.chunks : 1, of = blockIdx.x % chunks;
  const int64_t b = blockIdx.x / chunks, length = a.length(b);
  if (length < 0) {
    if (of == 0) finish(a, b, 0, length, -1, 0.0f, -1);
    return;
  }
  const int64_t j = follow(a, b, length, s.step, of == 0);
  const bool ends = j == length + a.bonus_row, bonus = j == length;
  const Step& step = s.step[j % kWarps];
  if (ends || step.fault || !a.rejection) {
    const int64_t fault = ends || !step.fault ? 0 : step.fault < 0 ? -1 : 2 * j + step.fault;
    const bool drawn = !ends && !fault;
    if (of == 0) finish(a, b, j, length, drawn ? step.token : -1, drawn ? step.log_prob : 0.0f, fault);
    return;
  }
  const ChunkWeight<W> own = weigh_chunk(StagedChunk<E, W>(a, b, j, step, !bonus, of, s), s);
  if (threadIdx.x == 0) {
    static_cast<ChunkWeight<W>*>(a.weights)[b * a.chunks + of] = own;
    __threadfence();
    s.last = fetch_add(&a.arrived[b], 1u) == chunks - 1;
    __threadfence();
  }
  __syncthreads();
  if (!s.last) return;
  bool fault;
  const int64_t token = draw(a, b, j, bonus, step, &fault, s);
  const float score = a.processing[0].score(a.target.at(b, j)[token], token, step.q.threshold);
  finish(a, b, j, length, fault ? -1 : token, fault ? 0.0f : score - step.q.lse, fault ? 2 * j + 2 : 0);
}

}  // namespace pyquiet
