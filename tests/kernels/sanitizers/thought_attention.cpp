// Runs the CPU kernels of thought attention, forward and backward, on problems that take every branch between threads:
//   thought_attention <level>
// What is written must be finite, lie inside of its rows and be the same bits for 1, 2, 3 and 5 threads; those of 2 and
// 3 run at once, as two callers. LEVELS lists the levels that are linked, as X(level) ...
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "../../../csrc/thought_attention/cpu.hpp"

namespace {

using namespace pyquiet;

struct Shape {
  int64_t B, H, G, T, P, Q, D, S, window;
  float softcap;
  bool padded;  // on the left: text_start
  int64_t gap;  // elements between rows; then the memory starts one element off, too
};

constexpr Shape kShapes[] = {
    {1, 1, 1, 1, 1, 1, 8, 1, 0, 0, false, 0},         // one row
    {2, 8, 2, 1, 4, 1, 136, 90, 0, 0, true, 8},       // decoding: too few rows for the lanes
    {1, 4, 2, 6, 4, 2, 136, 0, 0, 0, false, 0},       // no text
    {1, 2, 1, 70, 3, 2, 64, 70, 0, 0, false, 0},      // one head: its text is packed by all threads
    {2, 3, 1, 45, 5, 4, 24, 130, 33, 2.0f, true, 8},  // several shares of a head, several blocks of keys
    {5, 8, 4, 33, 2, 2, 24, 70, 9, 0, true, 8},       // many heads: each is packed by one thread
    {8, 8, 4, 66, 3, 2, 8, 20, 0, 3.0f, false, 0},    // a share of several chunks
    {1, 2, 2, 3, 70, 70, 16, 5, 50, 0, false, 0},     // positions larger than a tile, a path larger than a block
    {1, 2, 1, 20, 8, 8, 256, 66, 0, 0, true, 0},      // as large as a tile can be
};

template <class E>
E element(float x) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    return to_bfloat16(x);
  } else {
    return static_cast<E>(x);
  }
}

// Memory of exactly the size that the shape asks for, all bits set: NaN.
template <class E, int N>
struct Tensor {
  Tensor(const std::array<int64_t, N>& shape, int64_t gap) : start(gap > 0) {
    view.shape = shape;
    int64_t stride = 1, last = 0;
    for (int d = N - 1; d >= 0; --d) {
      view.stride[d] = stride;
      stride *= std::max<int64_t>(shape[d], 1);
      if (d == N - 1) stride += gap;
      last += (shape[d] - 1) * view.stride[d];
      size *= shape[d];
    }
    if (size == 0) return;  // no memory, as in torch
    memory.resize(start + last + 1);
    std::memset(memory.data(), 0xff, memory.size() * sizeof(E));
    view.data = memory.data() + start;
  }

  template <class Make>
  void fill(Make make) {
    for (int64_t i = 0; i < size; ++i) view.data[offset(i)] = element<E>(make());
  }

  int64_t offset(int64_t i) const {
    const int64_t width = view.shape[N - 1], row = N > 1 ? view.stride[N - 2] : 0;
    return i / width * row + i % width;
  }

  // All of it is finite, and nothing is written between the rows.
  bool sound() const {
    std::vector<bool> inside(memory.size());
    for (int64_t i = 0; i < size; ++i) {
      if (!std::isfinite(to_float(view.data[offset(i)]))) return false;
      inside[start + offset(i)] = true;
    }
    E poison;
    std::memset(&poison, 0xff, sizeof poison);
    for (size_t i = 0; i < memory.size(); ++i)
      if (!inside[i] && std::memcmp(&memory[i], &poison, sizeof poison) != 0) return false;
    return true;
  }

  bool operator==(const Tensor& other) const {
    return size == 0 || std::memcmp(memory.data(), other.memory.data(), memory.size() * sizeof(E)) == 0;
  }

  int64_t start, size = 1;
  std::vector<E> memory;
  View<E, N> view;
};

template <class E, int N>
View<const E, N> constant(const Tensor<E, N>& x) {
  return {x.view.data, x.view.shape, x.view.stride};
}

template <class E>
struct Inputs {
  Inputs(const Shape& s, bool poisoned)
      : shape(s),
        query({s.B, s.H, s.T, s.Q, s.D}, s.gap),
        d_out({s.B, s.H, s.T, s.Q, s.D}, s.gap),
        path_key({s.B, s.G, s.T, s.P, s.D}, s.gap),
        path_value({s.B, s.G, s.T, s.P, s.D}, s.gap),
        text_key({s.B, s.G, s.S, s.D}, s.gap),
        text_value({s.B, s.G, s.S, s.D}, s.gap),
        limits({s.B, s.T}, 0),
        begin({s.B}, 0) {
    std::mt19937 random;
    limits.fill([&] { return static_cast<int64_t>(random() % (s.S + 1)); });
    begin.fill([&] { return static_cast<int64_t>(random() % (s.S / 2 + 1)); });
    if (poisoned) return;
    std::normal_distribution<float> normal;
    for (auto* x : {&query, &d_out, &path_key, &path_value}) x->fill([&] { return normal(random); });
    for (auto* x : {&text_key, &text_value}) x->fill([&] { return normal(random); });
  }

  void give(ThoughtInputs<E>& a) const {
    a.query = constant(query);
    a.text_key = constant(text_key);
    a.text_value = constant(text_value);
    a.path_key = constant(path_key);
    a.path_value = constant(path_value);
    a.text_limits = constant(limits);
    if (shape.padded) a.text_start = constant(begin);
    a.scale = 1 / std::sqrt(static_cast<float>(shape.D));
    a.window = shape.window;
    a.softcap = shape.softcap;
  }

  Shape shape;
  Tensor<E, 5> query, d_out, path_key, path_value;
  Tensor<E, 4> text_key, text_value;
  Tensor<int64_t, 2> limits;
  Tensor<int64_t, 1> begin;
};

template <class E>
struct Results {
  explicit Results(const Shape& s)
      : out({s.B, s.H, s.T, s.Q, s.D}, s.gap),
        d_query({s.B, s.H, s.T, s.Q, s.D}, s.gap),
        d_path_key({s.B, s.G, s.T, s.P, s.D}, s.gap),
        d_path_value({s.B, s.G, s.T, s.P, s.D}, s.gap),
        d_text_key({s.B, s.G, s.S, s.D}, s.gap),
        d_text_value({s.B, s.G, s.S, s.D}, s.gap),
        lse({s.B, s.H, s.T, s.Q}, 0) {}

  // Calls take(name, tensor, the other's) for each.
  template <class Take>
  void each(const Results& other, Take take) const {
    take("out", out, other.out);
    take("lse", lse, other.lse);
    take("d_query", d_query, other.d_query);
    take("d_path_key", d_path_key, other.d_path_key);
    take("d_path_value", d_path_value, other.d_path_value);
    take("d_text_key", d_text_key, other.d_text_key);
    take("d_text_value", d_text_value, other.d_text_value);
  }

  Tensor<E, 5> out, d_query, d_path_key, d_path_value;
  Tensor<E, 4> d_text_key, d_text_value;
  Tensor<float, 4> lse;
};

template <class E>
struct Level {
  const char* name;
  void (*forward)(const ThoughtAttention<E>&, int);
  void (*backward)(const ThoughtAttentionBackward<E>&, int);
};

template <class E>
Level<E> find_level(const std::string& name) {
#define X(level) {#level, &level::thought_attention_forward<E>, &level::thought_attention_backward<E>},
  for (const Level<E>& level : std::initializer_list<Level<E>>{LEVELS})
#undef X
    if (level.name == name) return level;
  std::fprintf(stderr, "level %s is not linked\n", name.c_str());
  std::exit(2);
}

template <class E>
Results<E> run(const Level<E>& level, const Inputs<E>& inputs, int threads) {
  Results<E> r(inputs.shape);
  ThoughtAttention<E> forward;
  inputs.give(forward);
  forward.out = r.out.view;
  forward.lse = r.lse.view;
  level.forward(forward, threads);
  ThoughtAttentionBackward<E> backward;
  inputs.give(backward);
  backward.out = constant(r.out);
  backward.d_out = constant(inputs.d_out);
  backward.lse = constant(r.lse);
  backward.d_query = r.d_query.view;
  backward.d_text_key = r.d_text_key.view;
  backward.d_text_value = r.d_text_value.view;
  backward.d_path_key = r.d_path_key.view;
  backward.d_path_value = r.d_path_value.view;
  level.backward(backward, threads);
  return r;
}

// Whether all results of a shape are as they have to be.
template <class E>
bool passes(const Level<E>& level, const Shape& shape) {
  constexpr int kMostThreads = 5;
  // What the threads keep from call to call holds NaN before, so that a use of it shows.
  const int64_t D = std::min<int64_t>(shape.D + 32, 256);
  run(level, Inputs<E>({kMostThreads, 1, 1, 65, 2, 2, D, 65, 0, 0, false, 0}, true), kMostThreads);
  const Inputs<E> inputs(shape, false);
  const Results<E> expected = run(level, inputs, 1);
  bool all = true;
  const auto demand = [&](bool good, const char* name, int threads, const char* sentence) {
    all = all && good;
    if (!good)
      std::fprintf(stderr, "shape %td, %zu bytes an element, %d threads: %s %s\n", &shape - kShapes, sizeof(E), threads,
                   name, sentence);
  };
  const auto compare = [&](const Results<E>& actual, int threads) {
    actual.each(expected, [&](const char* name, const auto& x, const auto& y) {
      demand(x == y, name, threads, "has other bits than with one thread");
    });
  };
  expected.each(expected, [&](const char* name, const auto& x, const auto&) {
    demand(x.sound(), name, 1, "is not finite, or written outside of its rows");
  });
  std::unique_ptr<Results<E>> other;
  std::thread caller([&] { other = std::make_unique<Results<E>>(run(level, inputs, 2)); });
  compare(run(level, inputs, 3), 3);
  caller.join();
  compare(*other, 2);
  compare(run(level, inputs, kMostThreads), kMostThreads);
  return all;
}

template <class E>
bool passes(const std::string& name) {
  const Level<E> level = find_level<E>(name);
  bool all = true;
  for (const Shape& shape : kShapes) all = passes(level, shape) && all;
  return all;
}

}  // namespace

int main(int, char** argv) {
  choose_isa(argv[1]);  // also asks for the tiles
  const bool floats = passes<float>(argv[1]), halves = passes<BFloat16>(argv[1]);
  return floats && halves ? 0 : 1;
}
