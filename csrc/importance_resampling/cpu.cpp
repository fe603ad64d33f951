// Candidates and single draws on the CPU, compiled once for each instruction set.
//
// One pass over a row yields its log-sum-exp and, by the way, the CDF at the end of every 128 ids; a candidate then
// costs a binary search and the weights of 128 ids, which are still in L2. Neither branches on where the candidate
// lies, which would be guessed wrong, so that one runs beside the next: some 80 ns each with AVX-512, where the pass
// over 50257 ids takes 6 us. (Parts of 256 ids make the first candidate 5 % faster and all others 50 % slower.) A
// processed law needs passes of its own, over the same row in L2: one where there is a temperature, two for top-k or
// top-p.
#include "cpu.hpp"

#include "../common/row_law.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

#if defined(__AVX512BF16__)
// The same code would come out: nothing here multiplies bfloat16.
template <class E>
void draw_candidates(const CandidateDraw<E>& a, int threads) {
  avx512::draw_candidates(a, threads);
}
#else
namespace {

struct Memory {
  Survey law, base;
};

template <class E>
struct RowDraw {
  const CandidateDraw<E>& a;
  int64_t r;
  int threads;
  Memory& memory;
  Law<E> law{a.logits.at(r), a.logits.shape[1], a.processing, memory.law};

  void run() {
    const bool sums = !law.greedy && !a.gumbel && !a.deterministic;  // what is drawn by
    survey_row(law.row, law.survey, sums && !law.row.filtered(), threads);
    *a.fault.at(r) = !law.sound();
    if (!law.sound()) return;
    const double lse = a.lse ? base_lse() : 0;
    law.finish(sums, false, threads);
    const double law_lse = law.greedy ? 0 : law.survey.lse();
    if (a.law_lse) *a.law_lse.at(r) = static_cast<float>(law_lse);
    if (a.lse) *a.lse.at(r) = static_cast<float>(lse);
    const int64_t k = a.tokens.shape[1];
    const auto uniform = [&](int64_t j) { return uniform_of(j); };
    const auto take = [&](int64_t j, int64_t y) { set(j, y, law_lse, lse); };
    if (law.greedy) {
      for (int64_t j = 0; j < k; ++j) take(j, law.best);
    } else if (a.gumbel) {
      take(0, gumbel_argmax(law.row, a.stream.counter(r, 0, kGumbel), a.stream.seed, threads));
    } else if (a.deterministic) {
      draw(FixedWeights<E>(law.row, law.survey.top, threads), k, uniform, take);
    } else {
      draw(FloatWeights<E>{law.row, law.survey}, k, uniform, take);
    }
  }

  double uniform_of(int64_t j) const {
    PhiloxBlock counter = a.stream.counter(r);
    counter.word[3] += static_cast<uint32_t>(j);
    return uniform(philox(a.stream.seed, counter));
  }

  // Of the logits without the banned ids; a law without temperature has just met them.
  double base_lse() const {
    if (law.row.processing.inverse == 1) return law.survey.lse();
    Row<E> base{law.row.logits, law.row.size, {a.processing.banned, 1, 0, 1}};
    survey_row(base, memory.base, false, threads);
    return memory.base.lse();
  }

  void set(int64_t j, int64_t y, double law_lse, double lse) {
    *a.tokens.at(r, j) = y;
    *a.log_probs.at(r, j) = law.greedy ? 0 : static_cast<float>(law.row.score(y) - law_lse);
    if (a.lse) *a.log_base.at(r, j) = static_cast<float>(to_float(law.row.logits[y]) - lse);
  }
};

}  // namespace

template <class E>
void draw_candidates(const CandidateDraw<E>& a, int threads) {
  each_row<Memory>(a.logits.shape[0], a.logits.shape[1], threads,
                   [&](int64_t r, int share, Memory& memory) { RowDraw<E>{a, r, share, memory}.run(); });
}
#endif

template void draw_candidates(const CandidateDraw<float>&, int);
template void draw_candidates(const CandidateDraw<BFloat16>&, int);

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
