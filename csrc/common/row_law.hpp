// The law of a row on the CPU, read and ready for draws.
#pragma once

#include "fixed.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

// A row's law, once `read`.
template <class E>
struct Law {
  Row<E> row;
  Survey& survey;
  bool greedy;         // all of it is at `best`
  int64_t best = -1;   // greedy: the first of the largest scores
  uint64_t fixed = 0;  // deterministic: the sum of the integer weights

  Law(const E* logits, int64_t size, const Processing& processing, Survey& memory)
      : row{logits, size, processing}, survey(memory), greedy(processing.inverse == 0) {
    if (greedy) row.processing.inverse = 1;
  }

  bool sound() const { return survey.sound(); }
  double log_prob(int64_t v) const { return greedy ? (v == best ? 0 : kNegInf) : row.score(v) - survey.lse(); }
  int64_t fixed_prob(int64_t v) const {
    if (greedy) return v == best ? int64_t{1} << 62 : 0;
    return fixed_probability(fixed_weight(row.score(v) - survey.top), probability_unit(fixed));
  }

  // After the survey of the unfiltered row.
  void finish(bool draws, bool deterministic, int threads) {
    if (!sound()) return;
    if (greedy) {
      best = find(row, survey);
      return;
    }
    keep_largest(row, survey.top);
    if (row.filtered()) survey_row(row, survey, draws, threads);
    if (deterministic) fixed = fixed_total(row, survey.top, threads);
  }
};

template <class E>
inline void read(Law<E>& law, bool deterministic, int threads) {
  survey_row(law.row, law.survey, false, threads);
  law.finish(false, deterministic, threads);
}

// Below that many ids a row is not worth sharing.
constexpr int64_t kShared = 8 * kChunk;

// run(row, threads that share it, memory of the thread that calls): rows go to threads whole where there are enough of
// them; of few long ones, all threads share the chunks of one after the other.
template <class Memory, class Run>
inline void each_row(int64_t rows, int64_t ids, int threads, Run run) {
  if (rows < 4 * threads && ids >= kShared) {
    Memory memory;
    for (int64_t r = 0; r < rows; ++r) run(r, threads, memory);
    return;
  }
#pragma omp parallel num_threads(threads) if (rows > 1)
  {
    Memory memory;
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < rows; ++r) run(r, 1, memory);
  }
}

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
