#include "isa.hpp"

#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyquiet {
namespace {

#define PYQUIET_WORD(level) #level,
constexpr const char* kNames[] = {PYQUIET_FOR_EACH_ISA(PYQUIET_WORD)};
#undef PYQUIET_WORD
#define PYQUIET_VALUE(level) Isa::level,
constexpr Isa kLevels[] = {PYQUIET_FOR_EACH_ISA(PYQUIET_VALUE)};
#undef PYQUIET_VALUE

Isa chosen{};

// Tiles of bfloat16. Linux gives their registers only to a process that asks for them.
bool has_amx() {
#if defined(__linux__) && defined(__x86_64__)
  unsigned a, b, c, d;
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) && (d & kTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Every processor with these features has the rest of its level. They are asked one by one: g++ before 12 does not know
// the words x86-64-v2 to v4 here.
bool runs_here(Isa level) {
#if defined(__x86_64__) || defined(_M_X64)
  switch (level) {
    case Isa::sse4:
      return __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    case Isa::avx2:
      return runs_here(Isa::sse4) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    case Isa::avx512:
      return runs_here(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return runs_here(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return runs_here(Isa::avx512_bf16) && has_amx();
  }
  return false;
#else
  return level == Isa::neon;  // part of every arm64 processor
#endif
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

}  // namespace

Isa isa() { return chosen; }

const char* isa_name(Isa level) { return kNames[static_cast<int>(level)]; }

std::vector<std::string> compiled_isas() { return {std::begin(kNames), std::end(kNames)}; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> words;
  for (Isa level : kLevels) {
    if (runs_here(level)) words.emplace_back(isa_name(level));
  }
  return words;
}

void choose_isa(const char* wanted) {
  const std::string word = wanted ? wanted : "";
  bool found = false;
  for (Isa level : kLevels) {
    if (!runs_here(level) || (!word.empty() && word != isa_name(level))) continue;
    chosen = level;
    found = true;
  }
  if (found) return;
  if (word.empty()) {
    throw std::runtime_error("this processor runs none of the compiled instruction sets: " + joined(compiled_isas()));
  }
  throw std::runtime_error("PYQUIET_ISA=" + word + " is unknown or not supported by this processor; use one of " +
                           joined(supported_isas()) + ", or unset it");
}

}  // namespace pyquiet
