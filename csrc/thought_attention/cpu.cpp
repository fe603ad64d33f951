// Thought attention on the CPU, compiled once for each instruction set.
#include "cpu_backward.hpp"
#include "cpu_forward.hpp"

namespace pyquiet {
namespace PYQUIET_ISA {

template void thought_attention_forward(const ThoughtAttention<float>&, int);
template void thought_attention_forward(const ThoughtAttention<BFloat16>&, int);
template void thought_attention_backward(const ThoughtAttentionBackward<float>&, int);
template void thought_attention_backward(const ThoughtAttentionBackward<BFloat16>&, int);

}  // namespace PYQUIET_ISA
}  // namespace pyquiet
