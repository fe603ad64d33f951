// Thought attention on the CPU, compiled once for each instruction set.
#include "cpu.hpp"

#include "cpu_backward.hpp"
#include "cpu_forward.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

#if defined(__AMX_BF16__)
// Tiles are no use to floats, whose rows go in tiles of another size.
template <>
void thought_attention_forward(const ThoughtAttention<float>& a, int threads) {
  avx512_bf16::thought_attention_forward(a, threads);
}
template <>
void thought_attention_backward(const ThoughtAttentionBackward<float>& a, int threads) {
  avx512_bf16::thought_attention_backward(a, threads);
}
#else
template void thought_attention_forward(const ThoughtAttention<float>&, int);
template void thought_attention_backward(const ThoughtAttentionBackward<float>&, int);
#endif
template void thought_attention_forward(const ThoughtAttention<BFloat16>&, int);
template void thought_attention_backward(const ThoughtAttentionBackward<BFloat16>&, int);

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
