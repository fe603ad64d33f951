// The laws of a target and a draft row, and what is drawn from them.
#pragma once

#include <array>
#include <numeric>

#include "../common/fixed.hpp"
#include "contract.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

// A row's law, once `read`.
template <class E>
struct Law {
  Row<E> row;
  Survey survey;
  bool greedy;         // all of it is at `best`
  int64_t best = -1;   // greedy: the first of the largest scores
  uint64_t fixed = 0;  // deterministic: the sum of the integer weights

  Law(const E* logits, int64_t size, const Processing& processing)
      : row{logits, size, processing}, greedy(processing.inverse == 0) {
    if (greedy) row.processing.inverse = 1;
  }

  bool sound() const { return survey.sound(); }
  double log_prob(int64_t v) const { return greedy ? (v == best ? 0 : kNegInf) : row.score(v) - survey.lse(); }
  int64_t fixed_prob(int64_t v) const {
    if (greedy) return v == best ? int64_t{1} << 62 : 0;
    return fixed_probability(fixed_weight(row.score(v) - survey.top), probability_unit(fixed));
  }

  // After the survey of the unfiltered row.
  void finish(bool exact, bool deterministic, int threads) {
    if (!sound()) return;
    if (greedy) {
      best = find(row, survey);
      return;
    }
    keep_largest(row, survey.top);
    if (row.filtered()) survey_rows(&row, &survey, 1, exact, threads);
    if (deterministic) fixed = fixed_total(row, survey.top, threads);
  }
};

// A draw may follow where `exact`.
template <class E>
inline void read(Law<E>& law, bool exact, bool deterministic, int threads) {
  survey_rows(&law.row, &law.survey, 1, exact && !law.row.filtered(), threads);
  law.finish(exact, deterministic, threads);
}

// Two of one size at once.
template <class E>
inline void read(Law<E>& q, Law<E>& p, bool deterministic, int threads) {
  const Row<E> rows[] = {q.row, p.row};
  Survey surveys[2];
  survey_rows(rows, surveys, 2, false, threads);
  std::swap(q.survey, surveys[0]);
  std::swap(p.survey, surveys[1]);
  Law<E>* const laws[] = {&q, &p};
  const int apart = q.row.filtered() ? std::min(threads, 2) : 1;  // a threshold is found by one thread
  in_parallel(2, apart, [&](int64_t i) { laws[i]->finish(false, deterministic, apart > 1 ? 1 : threads); });
}

// max(q - p, 0) of a chunk.
template <class E>
struct FloatResidual {
  using Weight = float;
  using Sum = double;
  const Law<E>&q, &p;

  static F probability(const Law<E>& law, const Buffer& chunk, int i, float scale) {
    F x = exp2_or_zero((load(chunk.score + i) - law.survey.top) * kLog2E) * scale;
    PYQUIET_ROUNDED(x);  // equal laws leave nothing
    return x;
  }

  Sum read(int64_t c, Weight* weights) const {
    Buffer chunk;
    q.row.read(c, chunk);
    const int n = q.row.padded(c);
    const auto q_scale = static_cast<float>(1 / q.survey.total), p_scale = static_cast<float>(1 / p.survey.total);
    for (int i = 0; i < n; i += kLanes) store(weights + i, probability(q, chunk, i, q_scale));
    if (p.greedy) {
      if (p.best / kChunk == c) weights[p.best % kChunk] = 0;
    } else {
      p.row.read(c, chunk);
      for (int i = 0; i < n; i += kLanes)
        store(weights + i, max(load(weights + i) - probability(p, chunk, i, p_scale), F{}));
    }
    return sum_in_double(weights, n);
  }
};

// The same in integers; without p, the weights of q.
template <class E>
struct FixedResidual {
  using Weight = int64_t;
  using Sum = uint64_t;
  const Law<E>& q;
  const Law<E>* p;

  Sum read(int64_t c, Weight* weights) const {
    Buffer chunk;
    ChunkWeights fixed;
    q.row.read(c, chunk);
    const int n = q.row.padded(c);
    fixed.read(chunk, n, q.survey.top);
    const double q_unit = probability_unit(q.fixed);
    for (int i = 0; i < n; ++i)
      weights[i] = p ? fixed_probability(fixed.at(i), q_unit) : static_cast<int64_t>(fixed.at(i));
    if (p && p->greedy) {
      if (p->best / kChunk == c) weights[p->best % kChunk] = 0;
    } else if (p) {
      p->row.read(c, chunk);
      fixed.read(chunk, n, p->survey.top);
      const double p_unit = probability_unit(p->fixed);
      for (int i = 0; i < n; ++i)
        weights[i] = std::max<int64_t>(weights[i] - fixed_probability(fixed.at(i), p_unit), 0);
    }
    return std::accumulate(weights, weights + n, Sum{0});
  }
};

// The first id whose cumulative weight is above threshold(sum of all); -1 where that is no law to draw from.
template <class Weights, class Threshold>
inline int64_t invert(const Weights& weights, int64_t chunks, int threads, Threshold threshold) {
  std::vector<typename Weights::Sum> sums(chunks);
  using Chunk = std::array<typename Weights::Weight, kChunk>;
  in_parallel(chunks, threads, [&](int64_t c) {
    alignas(64) Chunk chunk;
    sums[c] = weights.read(c, chunk.data());
  });
  const auto total = std::accumulate(sums.begin(), sums.end(), typename Weights::Sum{0});
  typename Weights::Sum limit{}, before{};
  if (!threshold(total, limit)) return -1;
  const int64_t c = chunk_above(sums, limit, before);
  alignas(64) Chunk chunk;
  weights.read(c, chunk.data());
  return c * kChunk + first_above(chunk.data(), weights.q.row.length(c), before, limit);
}

template <class E>
inline int64_t draw_fixed(const Law<E>& q, double u, int threads) {
  return invert(FixedResidual<E>{q, nullptr}, q.row.chunks(), threads, [&](uint64_t total, uint64_t& limit) {
    limit = cdf_threshold(u, total);
    return true;
  });
}

// The replacement of a rejected draft.
template <class E>
inline int64_t draw_residual(Law<E>& q, const Law<E>& p, double u, bool deterministic, int threads) {
  const int64_t chunks = q.row.chunks();
  if (deterministic) {
    const int64_t y = invert(FixedResidual<E>{q, &p}, chunks, threads, [&](uint64_t total, uint64_t& limit) {
      limit = total ? cdf_threshold(u, total) : 0;
      return static_cast<double>(total) * 0x1p-62 > kNoResidual;
    });
    return y >= 0 ? y : draw_fixed(q, u, threads);
  }
  const int64_t y = invert(FloatResidual<E>{q, p}, chunks, threads, [&](double total, double& limit) {
    limit = u * total;
    return total > kNoResidual;
  });
  if (y >= 0) return y;
  survey_rows(&q.row, &q.survey, 1, true, threads);
  return draw(q.row, q.survey, u);
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
