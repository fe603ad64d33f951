// What is drawn from the laws of a target and a draft row.
#pragma once

#include <array>
#include <numeric>

#include "../common/row_law.hpp"
#include "contract.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

// Two of one size at once.
template <class E>
inline void read(Law<E>& q, Law<E>& p, bool deterministic, int threads) {
  const Row<E>* const rows[] = {&q.row, &p.row};
  Survey* const surveys[] = {&q.survey, &p.survey};
  survey_rows(rows, surveys, 2, false, threads);
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

  Sum read(int64_t c, Weight* weights) const {
    Sum sum = 0;
    if_plain(q.row.plain(c) && p.row.plain(c) && !p.greedy, [&](auto plain) { sum = read_as<plain>(c, weights); });
    return sum;
  }

  template <bool kPlain>
  Sum read_as(int64_t c, Weight* weights) const {
    const Exp exp;
    const auto q_scale = static_cast<float>(1 / q.survey.total), p_scale = static_cast<float>(1 / p.survey.total);
    Sum sum = 0;
    for (int64_t v = c * kChunk; v < q.row.end(c); v += kBlock) {
      F x[4], y[4];
      q.row.template block<kPlain>(v, x);
      p.row.template block<kPlain>(v, y);
      for (int u = 0; u < 4; ++u) {
        F fraction;
        x[u] = exp.power(x[u] - q.survey.top, fraction) * q_scale * fraction;
        y[u] = exp.power(y[u] - p.survey.top, fraction) * p_scale * fraction;
        if (!kPlain && p.greedy) y[u] = F{};
        PYQUIET_ROUNDED(x[u]);  // equal laws leave nothing
        PYQUIET_ROUNDED(y[u]);
        x[u] = max(x[u] - y[u] - kNothing, F{});
      }
      if (!kPlain && p.greedy && p.best / kBlock == v / kBlock) x[p.best % kBlock / kLanes][p.best % kLanes] = 0;
      for (int u = 0; u < 4; ++u) store(weights + v % kChunk + u * kLanes, x[u]);
      sum += sum_of_lanes((x[0] + x[1]) + (x[2] + x[3]));
    }
    return sum;
  }

  // What -inf may have been given.
  static constexpr float kNothing = 1e-36f;
};

// The same in integers.
template <class E>
struct FixedResidual {
  using Weight = int64_t;
  using Sum = uint64_t;
  const Law<E>&q, &p;

  Sum read(int64_t c, Weight* weights) const {
    BlockWeights fixed;
    const double q_unit = probability_unit(q.fixed), p_unit = probability_unit(p.fixed);
    Sum sum = 0;
    for (int64_t v = c * kChunk; v < q.row.end(c); v += kBlock) {
      Weight* const to = weights + v % kChunk;
      F x[4];
      q.row.block(v, x);
      fixed.of(x, q.survey.top);
      for (int i = 0; i < kBlock; ++i) to[i] = fixed_probability(fixed.at(i), q_unit);
      if (p.greedy) {
        if (p.best / kBlock == v / kBlock) to[p.best % kBlock] = 0;
      } else {
        p.row.block(v, x);
        fixed.of(x, p.survey.top);
        for (int i = 0; i < kBlock; ++i) to[i] = std::max<Weight>(to[i] - fixed_probability(fixed.at(i), p_unit), 0);
      }
      sum = std::accumulate(to, to + kBlock, sum);
    }
    return sum;
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
  typename Weights::Sum limit{};
  if (!threshold(total, limit)) return -1;
  const auto [c, before] = Place<typename Weights::Sum>::find(chunks, {}, limit, [&](int64_t c) { return sums[c]; });
  alignas(64) Chunk chunk;
  weights.read(c, chunk.data());
  return c * kChunk + first_above(chunk.data(), weights.q.row.length(c), before, limit);
}

// The replacement of a rejected draft.
template <class E>
inline int64_t draw_residual(Law<E>& q, const Law<E>& p, double u, bool deterministic, int threads) {
  const int64_t chunks = q.row.chunks();
  if (deterministic) {
    const int64_t y = invert(FixedResidual<E>{q, p}, chunks, threads, [&](uint64_t total, uint64_t& limit) {
      limit = total ? cdf_threshold(u, total) : 0;
      return static_cast<double>(total) * 0x1p-62 > kNoResidual;
    });
    return y >= 0 ? y : draw(FixedWeights<E>(q.row, q.survey.top, threads), u);
  }
  const int64_t y = invert(FloatResidual<E>{q, p}, chunks, threads, [&](double total, double& limit) {
    limit = u * total;
    return total > kNoResidual;
  });
  if (y >= 0) return y;
  return draw_once(q.row, q.survey, u);
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
