// What a kernel says that plain C++ cannot: launches, shared memory, asynchronous copies and the tensor cores' 16-bit
// products. Everything else a kernel needs (threadIdx, __syncthreads, __shfl_*_sync, ...) keeps CUDA's own names.
// With PYQUIET_CUDA_SHIM, g++ compiles the kernels and tests/cuda_shim/shim.hpp executes all of these on the CPU.
//
// Fragments of one warp, in the registers of lane = 4 g + c (PTX ISA, mma.m16n8k16):
//   A, 16 rows x 16 k: a[i] holds the two elements k = 2 c + 8 (i / 2), + 1 of row g + 8 (i % 2)
//   B, 16 k x 8 columns: b0 holds k = 2 c, + 1 of column g, b1 the same from k = 8 on
//   accumulator, 16 rows x 8 columns: d[i] is row g + 8 (i / 2), column 2 c + i % 2
#pragma once

#include <cstdint>

#include "element.hpp"

namespace pyquiet {

// The unit of vector loads, stores and asynchronous copies.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

}  // namespace pyquiet

#if defined(PYQUIET_CUDA_SHIM)
#include "shim.hpp"
#else

#include <cuda_runtime.h>

#define PYQUIET_DEVICE __device__ __forceinline__

namespace pyquiet {

PYQUIET_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

PYQUIET_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory, or writes zeros, by the time wait_copies() returns to this thread.
PYQUIET_DEVICE void copy_async(Bytes16* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

PYQUIET_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four matrices of 8 x 8 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8, 16-byte aligned. Lane
// 4 g + c receives elements 2 c, + 1 of row g of each; transposed, elements g of the rows 2 c, + 1.
PYQUIET_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

PYQUIET_DEVICE void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, with a and b of element type E and sums in float.
template <class E>
PYQUIET_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
PYQUIET_DEVICE void multiply_add<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
PYQUIET_DEVICE void multiply_add<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats, rounded to nearest, in one register: `low` at the lower address.
template <class E>
PYQUIET_DEVICE uint32_t pack(float low, float high);

template <>
PYQUIET_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
PYQUIET_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

PYQUIET_DEVICE float to_float(Float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// 2^x to 2 ulp, denormal results as 0; 0 for -inf, NaN for NaN.
PYQUIET_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 ulp, for normal results; infinity for 0.
PYQUIET_DEVICE float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds to an integer that several threads add to; what it was before.
PYQUIET_DEVICE uint32_t fetch_add(uint32_t* to, uint32_t x) { return atomicAdd(to, x); }
PYQUIET_DEVICE uint64_t fetch_add(uint64_t* to, uint64_t x) {
  static_assert(sizeof(unsigned long long) == 8, "what CUDA adds atomically");
  return atomicAdd(reinterpret_cast<unsigned long long*>(to), x);
}

// Starts `blocks` blocks on a stream; returns a cudaError_t, 0 for success.
template <class Argument>
int launch(void (*kernel)(Argument), int64_t blocks, int threads, int shared_bytes, void* stream,
           const Argument& argument) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(argument);
  return cudaGetLastError();
}

}  // namespace pyquiet
#endif
