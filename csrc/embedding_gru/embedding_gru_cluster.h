// The recurrence in clusters of blocks, for compute capability 9.0: the blocks of a slice write
// into each other's shared memory, so that a step costs no trip through global memory. One cluster
// has 8 rows of the batch; clusters do not know of each other, and need not run at once.
//
// Forward: each block multiplies its units' weights with the whole state and sends its part of the
// new state to all. Backward: each block multiplies the gradients of its units' gates with the same
// weights, which gives a share of every unit's gradient, and sends each to the unit's owner, who
// adds the shares in the order of the blocks.
#pragma once

#include "embedding_gru/embedding_gru_units.h"

namespace fastlm {
namespace gru {

template <class Args>
struct ClusterArgs {
  Args args;
  int blocks;  // of the cluster that have units
};

// the parts of one block's shared memory, one after the other
template <class T, bool Backward>
struct ClusterShared {
  // forward: states as they come, [2][row][kStateStride], bfloat16 with one part, else float32
  static constexpr int kStateBytes = T::kParts == 1 ? 2 : 4;
  static constexpr int kStates = kBatchTile * T::kStateStride * kStateBytes;
  // backward: gradients of the block's own gates, [2][part][row][kOwnStride] bfloat16
  static constexpr int kOwnStride = kGates * T::kUnits + 8;
  static constexpr int kOwn = T::kParts * kBatchTile * kOwnStride * 2;
  static constexpr int kOperandBytes = 2 * (Backward ? kOwn : kStates);
  // forward: [share][gate][unit][kSumStride]; backward: [2][sender][unit][row]
  static constexpr int kSums = T::kShares * kGates * T::kUnits * kSumStride;
  static constexpr int kReceived = T::kDepth * kBatchTile;
  static constexpr int kSumBytes = (Backward ? 2 * kReceived : kSums) * 4;
  static constexpr int kStage = kWarps * kStagedTiles * T::kParts * 512;
  static constexpr int kBytes = T::kLooseBytes + kOperandBytes + kSumBytes + 16;
  static_assert(kStage <= kOperandBytes + kSumBytes, "the stage is too large");

  unsigned char *loose, *operand, *sums;
  uint32_t signals;  // two of 8 bytes, for even and odd steps

  FASTLM_DEVICE ClusterShared()
      : loose(gpu::dynamic_shared()),
        operand(loose + T::kLooseBytes),
        sums(operand + kOperandBytes),
        signals(gpu::shared_address(sums + kSumBytes)) {}

  template <class Element>
  FASTLM_DEVICE void load(Weights<T, Backward>& weights, int warp, const Element& element) const {
    weights.load(element, reinterpret_cast<uint4*>(loose) + warp * kGates * T::kLoose * 32,
                 reinterpret_cast<uint4*>(operand + warp * (kStage / kWarps)));
    gpu::barrier();
    for (int i = gpu::thread_index(); i < kOperandBytes / 16; i += kThreads) {
      reinterpret_cast<uint4*>(operand)[i] = uint4{0, 0, 0, 0};
    }
    if (gpu::thread_index() == 0) {
      gpu::signal_start(signals);
      gpu::signal_start(signals + 8);
      gpu::signals_started();
    }
    gpu::barrier();
  }
};

FASTLM_DEVICE Place place_in_cluster(int64_t batch, int cluster) {
  const int64_t slice = gpu::block_index() / cluster;
  return Place(gpu::cluster_rank(), slice * kBatchTile, batch, kBatchTile);
}

template <class T>
FASTLM_DEVICE void store_output(void* exchange, int64_t at, float v0, float v1) {
  if (T::kParts == 1) {
    static_cast<uint32_t*>(exchange)[at / 2] = gpu::pack_bfloat16(v0, v1);
  } else {
    static_cast<float*>(exchange)[at] = v0;
    static_cast<float*>(exchange)[at + 1] = v1;
  }
}

// The largest hidden size first refused: weights of more units do not fit into a cluster of 16.
constexpr int64_t largest_hidden(int parts) { return parts == 1 ? 768 : parts == 3 ? 512 : 0; }

template <class Action>
auto with_cluster_tiling(int64_t hidden, int parts, const Action& action) {
  if (parts == 1) {
    if (hidden <= 256) return action(Tiling<1, 4, 8>{});
    if (hidden <= 512) return action(Tiling<1, 4, 16, 12>{});
    return action(Tiling<1, 4, 24, 12>{});
  }
  if (hidden <= 256) return action(Tiling<3, 2, 4>{});
  return action(Tiling<3, 2, 8, 6>{});
}

struct Cluster {
  int blocks, size;  // with units; rounded up to what a cluster can be

  template <class T>
  static Cluster of(int64_t hidden) {
    Cluster c{int((hidden + T::kUnits - 1) / T::kUnits), 1};
    while (c.size < c.blocks) c.size *= 2;
    return c;
  }
};

template <class T, bool Backward, class Args>
GruCudaFit cluster_fit(void (*kernel)(ClusterArgs<Args>), int64_t hidden) {
  constexpr int kBytes = ClusterShared<T, Backward>::kBytes;
  const Cluster c = Cluster::of<T>(hidden);
  int device = 0, major = 0, minor = 0, clusters = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e == cudaSuccess) {
    e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (e == cudaSuccess) {
    e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (e == cudaSuccess && (major != 9 || minor != 0)) return {0, "compute capability 9.0 only"};
  if (e == cudaSuccess) {
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  if (e == cudaSuccess) e = gpu::resident_clusters(kernel, c.size, kThreads, kBytes, &clusters);
  if (e != cudaSuccess) return {0, cudaGetErrorString(e)};
  if (clusters == 0) return {0, "no cluster of that size fits"};
  return {clusters * int64_t(kBatchTile), nullptr};
}

template <class T, bool Backward, class Args>
cudaError_t run_clusters(void (*kernel)(ClusterArgs<Args>), const Args& args, cudaStream_t stream) {
  const GruShape& s = args.shape;
  const Cluster c = Cluster::of<T>(s.hidden);
  const int64_t slices = (s.batch + kBatchTile - 1) / kBatchTile;
  if (s.steps > INT32_MAX || slices * c.size > INT32_MAX) return cudaErrorInvalidValue;
  const GruCudaFit fit = cluster_fit<T, Backward>(kernel, s.hidden);
  if (fit.reason) return cudaErrorNotSupported;
  return gpu::launch_clusters(kernel, int(slices * c.size), c.size, kThreads,
                              ClusterShared<T, Backward>::kBytes, stream,
                              ClusterArgs<Args>{args, c.blocks});
}

}  // namespace gru
}  // namespace fastlm
