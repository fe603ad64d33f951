// The CUDA implementation's entry points, for a caller that any C++ compiler compiles.
//
// Views, and the pointers in `stream` and `processing`, hold device addresses, aligned as their elements are; `stream`
// is a cudaStream_t. A cudaError_t is returned (0 is success), and the device is not waited for. Shapes and options
// have been checked; lengths and draft_tokens have not, as that would mean waiting: where one that is looked at is out
// of its range, fault[b] is -1. Every output is written.
#pragma once

#include "contract.hpp"

namespace pyquiet {

// Floats of scratch memory, 16-byte aligned, for `rows` (k or k + 1) rows of the target.
int64_t verify_draft_workspace(int64_t B, int64_t k, int64_t rows, int64_t V);

template <class E>
int verify_draft_cuda(const DraftVerification<E>& a, float* workspace, void* stream);

}  // namespace pyquiet
