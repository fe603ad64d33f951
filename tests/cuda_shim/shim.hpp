// Executes CUDA kernels on the CPU, one block at a time, each thread a fiber that yields where threads wait for each
// other. Warps run one after the other, each as far as it gets without a block barrier, so that a missing barrier lets
// a warp read what was not written or overwrite what was not read; the order of warps and lanes is ascending or
// shuffled.
//
// What goes wrong only through timing on a GPU is provoked: asynchronous copies happen when they are waited for,
// shared memory starts as NaN, warp instructions check that all lanes meet in the same one, and addresses of vector
// accesses are checked for alignment. Races between lanes of one warp without __syncwarp show only in shuffled order.
#pragma once

#include <sanitizer/asan_interface.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the shim's switch between fibers is written for x86-64"
#endif

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define PYQUIET_DEVICE inline

// Saves the callee's registers on the running stack and its top in *from, then goes on where `to` was saved.
extern "C" void pyquiet_switch(void** from, void* to);
asm(R"(
.text
.globl pyquiet_switch
pyquiet_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace shim {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "shim: %s\n", what);
  std::abort();
}

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* top = nullptr;
  Barrier* waits_for = nullptr;
  unsigned generation = 0;
  bool done = false;
  std::vector<Copy> copies;

  bool runnable() const { return !done && !(waits_for && waits_for->generation == generation); }
};

// What the lanes of a warp show each other in one instruction. Two boards in turn: a lane may be a whole instruction
// ahead of another that still reads.
struct Board {
  const char* instruction[32];
  uint64_t value[32];
  uint32_t fragment[32][6];
};

struct Warp {
  Barrier barrier;
  Board board[2];
  unsigned turn[32] = {};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::unique_ptr<char[]> shared;  // exactly as large as asked for, so that AddressSanitizer sees an overrun
  int shared_bytes = 0;
  std::function<void()> body;
  void* scheduler = nullptr;
  int running = 0;
};

inline Block* block = nullptr;
inline unsigned seed = 0;  // 0: ascending order

struct Index {
  unsigned x = 0;
};

inline void wait(Barrier& barrier) {
  Fiber& fiber = block->fibers[block->running];
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  pyquiet_switch(&fiber.top, block->scheduler);
}

inline void run_fiber() {
  block->body();
  Fiber& fiber = block->fibers[block->running];
  if (!fiber.copies.empty()) fail("a thread ends with copies it never waited for");
  fiber.done = true;
  pyquiet_switch(&fiber.top, block->scheduler);
}

inline void start(Fiber& fiber) {
  constexpr size_t kStack = 256 * 1024;
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  // The outermost frame never returns, so it leaves its marks for AddressSanitizer there.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get() + kStack - 4096, 4096);
  auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t{63});
  *--top = nullptr;  // as after a call, the stack is 8 bytes off a multiple of 16
  *--top = reinterpret_cast<void*>(&run_fiber);
  fiber.top = top - 6;
  std::fill_n(static_cast<void**>(fiber.top), 6, nullptr);
  fiber.done = false;
  fiber.waits_for = nullptr;
}

inline Index current;  // of the running thread
inline Index current_block;

inline void run_warp(const std::vector<int>& lanes) {
  for (bool any = true; any;) {
    any = false;
    for (const int lane : lanes) {
      if (!block->fibers[lane].runnable()) continue;
      any = true;
      block->running = lane;
      current.x = lane;
      pyquiet_switch(&block->scheduler, block->fibers[lane].top);
    }
  }
}

inline void run_block(std::mt19937& random) {
  const int threads = static_cast<int>(block->fibers.size());
  std::memset(block->shared.get(), 0xff, block->shared_bytes);  // NaN in every type
  for (Fiber& fiber : block->fibers) start(fiber);
  std::vector<std::vector<int>> warps(threads / 32);
  for (int i = 0; i < threads; ++i) warps[i / 32].push_back(i);
  if (seed) {
    std::shuffle(warps.begin(), warps.end(), random);
    for (auto& lanes : warps) std::shuffle(lanes.begin(), lanes.end(), random);
  }
  const auto left = [] {
    return std::any_of(block->fibers.begin(), block->fibers.end(), [](const Fiber& f) { return !f.done; });
  };
  while (left()) {
    const auto runs = [](const Fiber& f) { return f.runnable(); };
    if (std::none_of(block->fibers.begin(), block->fibers.end(), runs)) fail("threads wait for ever");
    for (const auto& lanes : warps) run_warp(lanes);
  }
}

// The exchange of one warp instruction: lane shows its part, and sees the board once every lane has.
template <class Show>
const Board& exchange(const char* instruction, Show show) {
  Warp& warp = block->warps[block->running / 32];
  const int lane = block->running % 32;
  Board& board = warp.board[warp.turn[lane]++ % 2];
  board.instruction[lane] = instruction;
  show(board, lane);
  wait(warp.barrier);
  for (int i = 0; i < 32; ++i)
    if (board.instruction[i] != instruction) fail("lanes of a warp meet in different instructions");
  return board;
}

template <class T>
const Board& exchange_value(const char* instruction, T value) {
  return exchange(instruction, [&](Board& board, int lane) { std::memcpy(&board.value[lane], &value, sizeof value); });
}

template <class T>
T value_of(const Board& board, int lane) {
  T value;
  std::memcpy(&value, &board.value[lane], sizeof value);
  return value;
}

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector access is not 16-byte aligned");
}

}  // namespace shim

#define threadIdx ::shim::current
#define blockIdx ::shim::current_block

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline void __syncthreads() { shim::wait(shim::block->barrier); }
inline void __syncwarp() { shim::exchange_value("syncwarp", 0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return shim::value_of<T>(shim::exchange_value("shfl", value), lane % 32);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int from = static_cast<int>(threadIdx.x % 32) ^ mask;
  return shim::value_of<T>(shim::exchange_value("shfl_xor", value), from);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return shim::value_of<T>(shim::exchange_value("shfl_up", value), lane < lanes ? lane : lane - lanes);
}

template <class T, class Fold>
T shim_reduce(const char* instruction, T value, Fold fold) {
  const shim::Board& board = shim::exchange_value(instruction, value);
  T result = shim::value_of<T>(board, 0);
  for (int i = 1; i < 32; ++i) result = fold(result, shim::value_of<T>(board, i));
  return result;
}

inline int __reduce_min_sync(unsigned, int x) {
  return shim_reduce("reduce_min", x, [](int a, int b) { return std::min(a, b); });
}
inline int __reduce_max_sync(unsigned, int x) {
  return shim_reduce("reduce_max", x, [](int a, int b) { return std::max(a, b); });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return shim_reduce("ballot", unsigned{x} << threadIdx.x % 32, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, !x) == 0; }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline void __threadfence() {}

namespace pyquiet {

inline char* shared_memory() { return shim::block->shared.get(); }

inline void copy_async(Bytes16* to, const void* from, bool valid) {
  shim::check_aligned(to);
  if (valid) shim::check_aligned(from);
  shim::block->fibers[shim::block->running].copies.push_back({to, from, valid});
}

inline void wait_copies() {
  auto& copies = shim::block->fibers[shim::block->running].copies;
  for (const shim::Copy& copy : copies) {
    std::memset(copy.to, 0, 16);
    if (copy.valid) std::memcpy(copy.to, copy.from, 16);
  }
  copies.clear();
}

template <bool Transposed>
void shim_load_matrices(uint32_t (&m)[4], const void* row) {
  shim::check_aligned(row);
  const auto& board = shim::exchange_value(Transposed ? "ldmatrix.trans" : "ldmatrix", row);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const int r = Transposed ? 2 * c + j : g, column = Transposed ? g : 2 * c + j;
      const char* from = shim::value_of<const char*>(board, 8 * i + r) + 2 * column;
      if (from < shim::block->shared.get() || from + 2 > shim::block->shared.get() + shim::block->shared_bytes)
        shim::fail("ldmatrix outside of shared memory");
      std::memcpy(&pair[j], from, 2);
    }
    std::memcpy(&m[i], pair, 4);
  }
  __syncwarp();  // nobody writes there before all have read
}
inline void load_matrices(uint32_t (&m)[4], const void* row) { shim_load_matrices<false>(m, row); }
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) { shim_load_matrices<true>(m, row); }

inline float to_float(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x, 2);
  return half;
}

inline void round_to(BFloat16& to, float x) { to = to_bfloat16(x); }
inline void round_to(Float16& to, float x) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&to, &half, 2);
}

template <class E>
uint32_t pack(float low, float high) {
  E pair[2];
  round_to(pair[0], low);
  round_to(pair[1], high);
  uint32_t both;
  std::memcpy(&both, pair, 4);
  return both;
}

// Element by element through the PTX layouts: row r, k of A is in lane 4 (r % 8) + k % 8 / 2, register r / 8 + 2 (k /
// 8), half k % 2; k, column n of B in lane 4 n + k % 8 / 2, register k / 8, half k % 2.
template <class E>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto& board = shim::exchange("mma", [&](shim::Board& to, int lane) {
    const uint32_t all[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(to.fragment[lane], all, sizeof all);
  });
  const auto element = [&](int lane, int word, int half) {
    E x;
    std::memcpy(&x, reinterpret_cast<const char*>(&board.fragment[lane][word]) + 2 * half, 2);
    return to_float(x);
  };
  const int lane = threadIdx.x % 32;
  for (int k = 0; k < 16; ++k) {
    const int c = k % 8 / 2;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      d[i] += element(4 * (row % 8) + c, row / 8 + 2 * (k / 8), k % 2) * element(4 * column + c, 4 + k / 8, k % 2);
    }
  }
}

inline float exp2_approximate(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

inline float reciprocal_approximate(float x) { return 1.0f / x; }

template <class T>
T fetch_add(T* to, T x) {
  return std::exchange(*to, *to + x);
}

template <class Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, int shared_bytes, void*, const Argument& argument) {
  if (shared_bytes > 163 * 1024) shim::fail("more shared memory than an sm_80 block may have");
  shim::Block block;
  shim::block = &block;
  block.fibers.resize(threads);
  block.warps.resize(threads / 32);
  block.shared.reset(new char[shared_bytes]);
  block.shared_bytes = shared_bytes;
  block.barrier.expected = threads;
  for (auto& warp : block.warps) warp.barrier.expected = 32;
  block.body = [&] { kernel(argument); };
  std::mt19937 random(shim::seed);
  for (int64_t i = 0; i < blocks; ++i) {
    shim::current_block.x = static_cast<unsigned>(i);
    shim::run_block(random);
  }
  return 0;
}

}  // namespace pyquiet
