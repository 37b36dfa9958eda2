// csrc/common/gpu.h for the CPU: the kernels' own source, with every thread of the grid a fiber.
//
// A scheduler runs the fibers in random order. It switches at everything other threads can notice:
// barriers, operations of a whole warp, and accesses to memory that the grid shares. Stores to such
// memory become visible late and in any order, vectors word by word; shared memory starts as NaN.
// What a kernel does in between runs alone, so races on plain shared memory show only if a switch
// lies between: a warp's matrix loads and products, and every barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define FASTLM_DEVICE inline
#define FASTLM_EMULATED_KERNEL

namespace fastlm {
namespace gpu {

constexpr int kLanesOfWarp = 32;
constexpr int kMaxPolls = 1 << 25;

int thread_index();
int block_index();
void barrier();
[[noreturn]] void stop();
unsigned char* dynamic_shared();
uint32_t shared_address(const void* p);

uint4 load_relaxed(const void* p);
void store_relaxed(void* p, uint32_t v);
void store_relaxed(void* p, uint32_t x, uint32_t y);

void load_matrices(uint32_t address, uint32_t (&m)[4]);
void load_shared(uint32_t address, uint32_t (&v)[4]);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t shuffle(uint32_t v, int lane);

int cluster_rank();
int cluster_size();
void cluster_barrier();
uint32_t address_in_block(uint32_t address, int rank);
void signal_start(uint32_t signal);
inline void signals_started() {}
void signal_expect(uint32_t signal, int bytes);
void signal_wait(uint32_t signal, int parity);
void store_remote(uint32_t to, uint32_t signal, const uint32_t (&v)[4]);
void store_remote(uint32_t to, uint32_t signal, float x, float y);

inline float float_of_bits(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t bits_of_float(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
uint32_t pack_bfloat16(float low, float high);
inline float exponential(float x) { return std::exp(x); }
inline float quotient(float a, float b) { return std::fabs(b) > 0x1p126f ? 0.f * a : a / b; }

// Runs `body` once per thread; the error that the device would have given.
cudaError_t run_grid(int blocks, int threads, size_t shared, const std::function<void()>& body);

// The same for clusters, a random number of them at once: they are not promised to run together.
cudaError_t run_clusters(int blocks, int threads, size_t shared, int cluster,
                         const std::function<void()>& body);

template <class Args>
cudaError_t launch_cooperative(void (*kernel)(Args), int blocks, int threads, size_t shared,
                               cudaStream_t, Args args) {
  return run_grid(blocks, threads, shared, [&] { kernel(args); });
}

template <class Args>
cudaError_t launch_clusters(void (*kernel)(Args), int blocks, int cluster, int threads,
                            size_t shared, cudaStream_t, Args args) {
  return run_clusters(blocks, threads, shared, cluster, [&] { kernel(args); });
}

template <class Args>
cudaError_t resident_clusters(void (*)(Args), int cluster, int, size_t, int* clusters) {
  *clusters = cluster <= 16 ? 1 : 0;
  return cudaSuccess;
}

}  // namespace gpu
}  // namespace fastlm
