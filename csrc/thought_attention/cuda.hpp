// The CUDA implementation's entry points, for a caller that any C++ compiler compiles.
//
// Views hold device pointers, 16-byte aligned or not; `stream` is a cudaStream_t. They return a cudaError_t (0 is
// success) and do not wait for the device. The shapes and the ranges of scale and softcap have been checked;
// text_limits and text_start have not, as that would mean waiting for the device: a row that one of them puts out of 0
// .. S gets NaN in out, lse and in the gradients of its query and own path.
#pragma once

#include "contract.hpp"

namespace pyquiet {

template <class E>
int thought_attention_forward_cuda(const ThoughtAttention<E>& a, void* stream);

// Floats of scratch memory, 16-byte aligned, that the backward needs.
int64_t thought_attention_backward_workspace(int64_t B, int64_t H, int64_t T, int64_t Q, int64_t G, int64_t S,
                                             int64_t P);

template <class E>
int thought_attention_backward_cuda(const ThoughtAttentionBackward<E>& a, float* workspace, void* stream);

}  // namespace pyquiet
