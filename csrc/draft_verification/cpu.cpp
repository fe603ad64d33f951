// Draft verification on the CPU, compiled once for each instruction set.
//
// Sequences go to threads whole where there are enough of them; their rows after a rejection are then never read. Of
// few sequences with long rows, all threads share the chunks of one row (or of a target and a draft row) after the
// other, which skips as much. 64 x 50257 in float32 then reads at the speed of memory: exponentials, one an element,
// run while the next chunk is fetched.
#include "cpu.hpp"

#include "cpu_rows.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

#if defined(__AVX512BF16__)
// The same code would come out: nothing here multiplies bfloat16.
template <class E>
void verify_draft(const DraftVerification<E>& a, int threads) {
  avx512::verify_draft(a, threads);
}
#else
namespace {

double uniform_at(const Stream& stream, int64_t row, int64_t offset, Purpose purpose) {
  return uniform(philox(stream.seed, stream.counter(row, offset, purpose)));
}

template <class E>
struct Sequence {
  const DraftVerification<E>& a;
  int64_t b;
  int threads;
  Survey* memory;  // [2] target, draft
  int64_t fault = 0;

  struct Choice {
    int64_t token;
    double log_prob;
    bool accepted;
  };

  Law<E> target(int64_t j) const { return {a.target.at(b, j), a.target.shape[2], a.processing, memory[0]}; }
  Law<E> draft(int64_t j) const {
    Processing processing = a.processing;
    processing.inverse = a.draft_inverse;
    return {a.draft.at(b, j), a.target.shape[2], processing, memory[1]};
  }

  bool sound(const Law<E>& law, int64_t j, bool is_draft) {
    if (!law.sound()) fault = 1 + 2 * j + is_draft;
    return law.sound();
  }

  Choice choose(int64_t j, int64_t d) {
    Law<E> q = target(j);
    const bool is_bonus = d < 0, is_exact = a.first_is_exact && j == 0 && !is_bonus;
    const bool tests = !(is_bonus || is_exact || a.gumbel || q.greedy);
    if (tests) return test(q, j, d);
    read(q, a.deterministic, threads);
    if (!sound(q, j, false)) return {};
    int64_t y = d;
    if (q.greedy) {
      y = is_exact ? d : q.best;
    } else if (!is_exact && a.gumbel) {
      y = gumbel_argmax(q.row, a.stream.counter(b, j, kGumbel), a.stream.seed, threads);
    } else if (is_bonus) {
      const double u = uniform_at(a.stream, b, j, kBonus);
      y = a.deterministic ? draw(FixedWeights<E>(q.row, q.survey.top, threads), u) : draw_once(q.row, q.survey, u);
    }
    return {y, q.greedy ? 0 : q.log_prob(y), y == d};
  }

  Choice test(Law<E>& q, int64_t j, int64_t d) {
    Law<E> p = draft(j);
    const bool given = a.draft_lse && !a.deterministic;
    given ? read(q, false, threads) : read(q, p, a.deterministic, threads);
    if (!sound(q, j, false) || (!given && !sound(p, j, true))) return {};
    const double u = uniform_at(a.stream, b, j, kAccept);
    bool accepted;
    if (a.deterministic) {
      accepted = accepts_fixed(u, q.fixed_prob(d), p.fixed_prob(d));
    } else {
      const double log_p = !given ? p.log_prob(d) : p.greedy ? 0.0 : p.row.score(d) - *a.draft_lse.at(b, j);
      if (log_p != log_p) fault = 2 + 2 * j;
      accepted = accepts(u, q.log_prob(d), log_p);
    }
    if (accepted) return {d, q.log_prob(d), true};
    if (given) read(p, false, threads);
    if (!sound(p, j, true)) return {};
    const int64_t y = draw_residual(q, p, uniform_at(a.stream, b, j, kResidual), a.deterministic, threads);
    return {y, q.log_prob(y), false};
  }

  void run() {
    const int64_t k = a.draft_tokens.shape[1], length = a.lengths ? *a.lengths.at(b) : k;
    int64_t count = 0, accepted = 0;
    bool bonus = false, done = false;
    for (int64_t j = 0; j <= k; ++j) {
      Choice choice{-1, 0, false};
      if (!done && j <= length && (j < length || a.target.shape[1] > k)) {
        choice = choose(j, j < length ? *a.draft_tokens.at(b, j) : -1);
        ++count;
        accepted += choice.accepted;
        bonus = j == length;
        done = !choice.accepted || fault;
      }
      *a.tokens.at(b, j) = choice.token;
      *a.log_probs.at(b, j) = static_cast<float>(choice.log_prob);
    }
    *a.count.at(b) = count;
    *a.accepted.at(b) = accepted;
    *a.bonus.at(b) = bonus;
    *a.fault.at(b) = fault;
  }
};

}  // namespace

template <class E>
void verify_draft(const DraftVerification<E>& a, int threads) {
  each_row<std::array<Survey, 2>>(
      a.tokens.shape[0], a.target.shape[2], threads,
      [&](int64_t b, int share, auto& memory) { Sequence<E>{a, b, share, memory.data()}.run(); });
}

#endif

template void verify_draft(const DraftVerification<float>&, int);
template void verify_draft(const DraftVerification<BFloat16>&, int);

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
