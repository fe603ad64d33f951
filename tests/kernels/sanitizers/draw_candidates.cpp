// Runs draws of candidates on the CPU on problems that take every branch between threads:
//   draw_candidates <level>
// Logits lie in memory of exactly their size. Results must be the same bits for 1, 2, 3 and 5 threads; those of 2 and 3
// run at once, as two callers. LEVELS lists the levels that are linked, as X(level) ...
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/importance_resampling/cpu.hpp"
#include "problems.hpp"

namespace {

using namespace pyquiet;

struct Problem {
  int64_t R, k, V;
  float inverse;
  int64_t top_k;
  double top_p;
  bool banned, base, gumbel, deterministic;
};

constexpr Problem kProblems[] = {
    {1, 70, 16421, 1, 0, 1, false, true, false, false},  // one row, shared
    {2, 5, 18433, 2, 40, 0.9, true, true, false, true},  // the same with all options
    {1, 1, 16385, 1, 17000, 1, true, false, true, false}, {9, 3, 2049, 0.5f, 0, 0.5, false, true, false, false},
    {9, 33, 4097, 1, 0, 1, true, true, false, false},     {9, 2, 63, 0, 5, 0.9, true, true, false, false},  // greedy
    {9, 1, 257, 2, 0, 1, false, false, false, false},     {3, 4, 1, 1, 1, 0.5, false, true, false, true},
};

template <class E>
struct Inputs {
  explicit Inputs(const Problem& p) : problem(p), banned(new bool[p.V]()) {
    std::mt19937 random;
    std::normal_distribution<float> normal(0, 2);
    for (int64_t i = 0; i < p.R * p.V; ++i) logits.push_back(element<E>(normal(random)));
    for (int64_t v = 1; v < p.V; v += 3) banned[v] = p.banned;
  }

  Problem problem;
  std::vector<E> logits;
  std::unique_ptr<bool[]> banned;
};

struct Results {
  explicit Results(const Problem& p)
      : tokens(p.R * p.k), fault(p.R), log_probs(p.R * p.k), log_base(p.R * p.k), lse(p.R), law_lse(p.R) {}

  bool operator==(const Results& o) const {
    return tokens == o.tokens && fault == o.fault && log_probs == o.log_probs && log_base == o.log_base &&
           lse == o.lse && law_lse == o.law_lse;
  }

  std::vector<int64_t> tokens, fault;
  std::vector<float> log_probs, log_base, lse, law_lse;
};

template <class E>
struct Level {
  const char* name;
  void (*draw)(const CandidateDraw<E>&, int);
};

template <class E>
Level<E> find_level(const std::string& name) {
#define X(level) {#level, &level::draw_candidates<E>},
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
  CandidateDraw<E> a;
  a.logits = view(in.logits.data(), std::array{p.R, p.V});
  a.stream = {7, 6, {nullptr, CounterField::kRow}, {nullptr, 3}, {nullptr, 0}, {nullptr, 2}};
  a.processing = {p.banned ? in.banned.get() : nullptr, p.inverse, p.top_k, p.top_p};
  a.gumbel = p.gumbel;
  a.deterministic = p.deterministic;
  a.tokens = view(r.tokens.data(), std::array{p.R, p.k});
  a.log_probs = view(r.log_probs.data(), std::array{p.R, p.k});
  if (p.base) {
    a.log_base = view(r.log_base.data(), std::array{p.R, p.k});
    a.lse = view(r.lse.data(), std::array{p.R});
  } else {
    a.law_lse = view(r.law_lse.data(), std::array{p.R});
  }
  a.fault = view(r.fault.data(), std::array{p.R});
  level.draw(a, threads);
  return r;
}

template <class E>
bool passes(const Level<E>& level, const Problem& problem) {
  const Inputs<E> inputs(problem);
  const Results expected = run(level, inputs, 1);
  bool good = true;
  for (int64_t fault : expected.fault) good = good && fault == 0;
  for (int64_t token : expected.tokens)
    good = good && token >= 0 && token < problem.V && !(problem.banned && token % 3 == 1);
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
