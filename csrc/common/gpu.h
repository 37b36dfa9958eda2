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
// of a wait that never ends, a second or more: a defect must not hang the device
constexpr int kMaxPolls = 1 << 25;

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

FASTLM_DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }

// Clusters of blocks, compute capability 9.0 and later. A signal counts the bytes that arrive with
// it; a phase ends when one thread has said how many to expect and all have come.
FASTLM_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}
FASTLM_DEVICE int cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return int(size);
}
FASTLM_DEVICE void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
FASTLM_DEVICE uint32_t address_in_block(uint32_t address, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}
FASTLM_DEVICE void signal_start(uint32_t signal) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(signal) : "memory");
}
// after all signals of a block were started, before the first cluster_barrier
FASTLM_DEVICE void signals_started() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FASTLM_DEVICE void signal_expect(uint32_t signal, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(signal), "r"(bytes)
               : "memory");
}
FASTLM_DEVICE void signal_wait(uint32_t signal, int parity) {
  for (int tries = 0;; ++tries) {
    uint32_t done;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(signal), "r"(parity)
        : "memory");
    if (done) return;
    if (tries == kMaxPolls) stop();
  }
}
// to addresses from address_in_block
FASTLM_DEVICE void store_remote(uint32_t to, uint32_t signal, const uint32_t (&v)[4]) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(signal)
      : "memory");
}
FASTLM_DEVICE void store_remote(uint32_t to, uint32_t signal, float x, float y) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          to),
      "f"(x), "f"(y), "r"(signal)
      : "memory");
}

struct ClusterLaunch {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = {};

  ClusterLaunch(int blocks, int cluster, int threads, size_t shared, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

template <class Args>
cudaError_t launch_clusters(void (*kernel)(Args), int blocks, int cluster, int threads,
                            size_t shared, cudaStream_t stream, Args args) {
  ClusterLaunch launch(blocks, cluster, threads, shared, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, args);
}

// clusters of so many blocks that the device can hold at once
template <class Args>
cudaError_t resident_clusters(void (*kernel)(Args), int cluster, int threads, size_t shared,
                              int* clusters) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  ClusterLaunch launch(cluster, cluster, threads, shared, nullptr);
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &launch.config);
}

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
