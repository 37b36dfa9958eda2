// What the CUDA kernels ask of the hardware beyond plain C++. The tests compile the same kernels
// for the CPU against another header that keeps these names (tests/emulated_gpu), where the
// threads of a grid run in random order.
//
// A shared address is what the instructions take: 32 bits, in bytes.
#pragma once

#if defined(FASTLM_EMULATED)
#include "emulated_gpu.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#define FASTLM_DEVICE __device__ __forceinline__

namespace fastlm {
namespace gpu {

constexpr int kLanesOfWarp = 32;

FASTLM_DEVICE int thread_index() { return int(threadIdx.x); }
FASTLM_DEVICE int block_index() { return int(blockIdx.x); }
FASTLM_DEVICE void barrier() { __syncthreads(); }
[[noreturn]] FASTLM_DEVICE void stop() {
  __trap();
  __builtin_unreachable();
}

FASTLM_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared[];
  return shared;
}
FASTLM_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// seen by all of the grid, in no particular order with other stores
FASTLM_DEVICE uint4 load_relaxed(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
FASTLM_DEVICE void store_relaxed(void* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
FASTLM_DEVICE void store_relaxed(void* p, uint32_t x, uint32_t y) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(x), "r"(y) : "memory");
}

// four 8x8 matrices of 16 bits; lane i gives the address of row i % 8 of matrix i / 8
FASTLM_DEVICE void load_matrices(uint32_t address, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

FASTLM_DEVICE void load_shared(uint32_t address, uint32_t (&v)[4]) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], bfloat16 operands
FASTLM_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// two floats to bfloat16, to nearest even; `low` goes into the low half
FASTLM_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
FASTLM_DEVICE float float_of_bits(uint32_t v) { return __uint_as_float(v); }
FASTLM_DEVICE uint32_t bits_of_float(float v) { return __float_as_uint(v); }

FASTLM_DEVICE float exponential(float x) { return expf(x); }
// 0 where the denominator is infinite or above 2^126
FASTLM_DEVICE float quotient(float a, float b) { return __fdividef(a, b); }

template <class Args>
cudaError_t launch_cooperative(void (*kernel)(Args), int blocks, int threads, size_t shared,
                               cudaStream_t stream, Args args) {
  void* parameters[] = {&args};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks),
                                     dim3(threads), parameters, shared, stream);
}

}  // namespace gpu
}  // namespace fastlm

#endif
