// Runs draft verification on the CPU on problems that take every branch between threads:
//   verify_draft <level>
// Logits lie in memory of exactly their size. Results must be the same bits for 1, 2, 3 and 5 threads; those of 2 and 3
// run at once, as two callers. LEVELS lists the levels that are linked, as X(level) ...
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/draft_verification/cpu.hpp"
#include "problems.hpp"

namespace {

using namespace pyquiet;

struct Problem {
  int64_t B, k, V;
  float inverse, draft_inverse;
  int64_t top_k;
  double top_p;
  bool banned, lse, bonus, gumbel, deterministic;
};

constexpr Problem kProblems[] = {
    {1, 3, 16421, 1, 1, 0, 1, false, false, true, false, false},    // one sequence, its rows shared
    {1, 3, 16421, 2, 1, 40, 0.9, true, true, true, false, true},    // the same with all options
    {2, 2, 18433, 1, 1, 17000, 1, true, false, true, true, false},  // noise; more kept than there are blocks
    {9, 2, 37, 0.5f, 0, 0, 0.5, false, false, false, false, false},
    {9, 0, 4097, 1, 1, 0, 1, false, false, true, false, false},   // bonus alone
    {9, 3, 2049, 0, 1, 5, 0.9, true, false, true, false, false},  // greedy
    {9, 3, 63, 1, 0, 0, 1, true, false, true, false, true},
    {3, 1, 1, 1, 1, 1, 0.5, false, true, true, true, false},
};

struct Results {
  explicit Results(const Problem& p)
      : tokens(p.B * (p.k + 1)), counts(3 * p.B), log_probs(p.B * (p.k + 1)), bonus(new bool[p.B]()) {}

  bool operator==(const Results& o) const {
    return tokens == o.tokens && counts == o.counts && log_probs == o.log_probs;
  }

  std::vector<int64_t> tokens, counts;
  std::vector<float> log_probs;
  std::unique_ptr<bool[]> bonus;
};

template <class E>
struct Inputs {
  explicit Inputs(const Problem& p) : problem(p), banned(new bool[p.V]()) {
    std::mt19937 random;
    std::normal_distribution<float> normal(0, 2);
    for (int64_t i = 0; i < p.B * (p.k + p.bonus) * p.V; ++i) target.push_back(element<E>(normal(random)));
    for (int64_t i = 0; i < p.B * p.k * p.V; ++i) draft.push_back(element<E>(normal(random)));
    for (int64_t i = 0; i < p.B * p.k; ++i) tokens.push_back(static_cast<int64_t>(random() % p.V));
    lse.assign(p.B * p.k, static_cast<float>(std::log(p.V)));
    for (int64_t v = 1; v < p.V; v += 3) banned[v] = p.banned;
  }

  Processing processing() const {
    return {problem.banned ? banned.get() : nullptr, problem.inverse, problem.top_k, problem.top_p};
  }
  static constexpr Stream kStream{7, 2, {nullptr, CounterField::kRow}, {nullptr, 3}, {nullptr, 0}, {nullptr, 0}};

  Problem problem;
  std::vector<E> target, draft;
  std::vector<int64_t> tokens;
  std::vector<float> lse;
  std::unique_ptr<bool[]> banned;
};

template <class E>
struct Level {
  const char* name;
  void (*verify)(const DraftVerification<E>&, int);
};

template <class E>
Level<E> find_level(const std::string& name) {
#define X(level) {#level, &level::verify_draft<E>},
  for (const Level<E>& level : std::initializer_list<Level<E>>{LEVELS})
#undef X
    if (level.name == name) return level;
  std::fprintf(stderr, "level %s is not linked\n", name.c_str());
  std::exit(2);
}

template <class E>
Results run(const Level<E>& level, const Inputs<E>& in, int threads) {
  const Problem& p = in.problem;
  Results r(p);
  DraftVerification<E> a;
  a.target = view(in.target.data(), std::array{p.B, p.k + p.bonus, p.V});
  a.draft = view(in.draft.data(), std::array{p.B, p.k, p.V});
  a.draft_tokens = view(in.tokens.data(), std::array{p.B, p.k});
  if (p.lse) a.draft_lse = view(in.lse.data(), std::array{p.B, p.k});
  a.stream = Inputs<E>::kStream;
  a.processing = in.processing();
  a.draft_inverse = p.draft_inverse;
  a.first_is_exact = false;
  a.gumbel = p.gumbel;
  a.deterministic = p.deterministic;
  a.tokens = view(r.tokens.data(), std::array{p.B, p.k + 1});
  a.count = view(r.counts.data(), std::array{p.B});
  a.accepted = view(r.counts.data() + p.B, std::array{p.B});
  a.log_probs = view(r.log_probs.data(), std::array{p.B, p.k + 1});
  a.bonus = view(r.bonus.get(), std::array{p.B});
  a.fault = view(r.counts.data() + 2 * p.B, std::array{p.B});
  level.verify(a, threads);
  return r;
}

template <class E>
bool passes(const Level<E>& level, const Problem& problem) {
  const Inputs<E> inputs(problem);
  const Results expected = run(level, inputs, 1);
  bool good = true;
  for (int64_t b = 0; b < problem.B; ++b)
    good = good && expected.counts[b] > 0 && expected.counts[2 * problem.B + b] == 0;
  for (int64_t token : expected.tokens) good = good && token >= -1 && token < problem.V;
  std::unique_ptr<Results> other;
  std::thread caller([&] { other = std::make_unique<Results>(run(level, inputs, 2)); });
  good = run(level, inputs, 3) == expected && good;
  caller.join();
  good = *other == expected && run(level, inputs, 5) == expected && good;
  if (!good) std::fprintf(stderr, "problem %td, %zu bytes an element: wrong\n", &problem - kProblems, sizeof(E));
  return good;
}

template <class E>
bool passes(const std::string& name) {
  const Level<E> level = find_level<E>(name);
  bool all = true;
  for (const Problem& problem : kProblems) all = passes(level, problem) && all;
  return all;
}

}  // namespace

int main(int, char** argv) {
  const bool floats = passes<float>(argv[1]), halves = passes<BFloat16>(argv[1]);
  return floats && halves ? 0 : 1;
}
