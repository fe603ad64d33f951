// The instruction-set levels that every kernel is compiled for, and the one chosen for this
// processor.
//
// A kernel's cpu.cpp is compiled once a level, with PYQUIET_ISA set to its word, and defines its
// functions in namespace pyquiet::PYQUIET_ISA. The caller keeps a table of them in the order of
// PYQUIET_FOR_EACH_ISA:
//   #define PYQUIET_ROW(level) &level::forward,
//   constexpr Forward table[] = {PYQUIET_FOR_EACH_ISA(PYQUIET_ROW)};
//   table[isa_index()](...)
#pragma once

#include <string>
#include <vector>

// Lowest first; CMakeLists.txt holds the same words with their compiler flags.
#if defined(__x86_64__) || defined(_M_X64)
#define PYQUIET_FOR_EACH_ISA(X) X(sse4) X(avx2) X(avx512) X(avx512_bf16) X(amx)
#else
#define PYQUIET_FOR_EACH_ISA(X) X(neon)
#endif

namespace pyquiet {

#define PYQUIET_ENUMERATOR(level) level,
enum class Isa { PYQUIET_FOR_EACH_ISA(PYQUIET_ENUMERATOR) };
#undef PYQUIET_ENUMERATOR

// Chooses the highest level that the processor runs, or the one that `wanted` names (empty or null:
// no wish). Throws std::runtime_error, naming the allowed words, for an unknown or unsupported one.
// Called once, at import.
void choose_isa(const char* wanted);

Isa isa();
inline int isa_index() { return static_cast<int>(isa()); }

const char* isa_name(Isa level);
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();  // by this processor

}  // namespace pyquiet
