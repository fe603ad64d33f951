// The CUDA implementation's entry points, for a caller that any C++ compiler compiles.
//
// Views, and the pointers in `stream` and `processing`, hold device addresses, aligned as their elements are; `stream`
// is a cudaStream_t. A cudaError_t is returned (0 is success), and the device is not waited for. Shapes and options
// have been checked; the values of the stream's tensors have not, as that would mean waiting: fault[r] is -1 where one
// is out of range. Every output is written. `gumbel` and `law_lse`, which candidates are not asked for, are refused.
#pragma once

#include "contract.hpp"

namespace pyquiet {

// Floats of scratch memory, 16-byte aligned.
int64_t draw_candidates_workspace(int64_t R, int64_t V);

template <class E>
int draw_candidates_cuda(const CandidateDraw<E>& a, float* workspace, void* stream);

}  // namespace pyquiet
