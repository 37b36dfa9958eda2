// The backward in clusters of blocks: see embedding_gru_cluster.h.
#include "embedding_gru/embedding_gru_cluster.h"

namespace fastlm {
namespace gru {
namespace {

// the gradients of the block's own gates, split into parts: [part][row][gate][kUnits]
template <class T>
FASTLM_DEVICE void store_own(unsigned char* own, const Pair& pair, int g, float v0, float v1) {
  constexpr int kStride = ClusterShared<T, true>::kOwnStride;
  uint32_t parts[T::kParts];
  split_pair(v0, v1, parts);
#pragma unroll
  for (int i = 0; i < T::kParts; ++i) {
    const int at = (i * kBatchTile + pair.row) * kStride + g * T::kUnits + pair.local;
    *reinterpret_cast<uint32_t*>(own + at * 2) = parts[i];
  }
}

template <class T, int State>
FASTLM_DEVICE void multiply_own(const Weights<T, true>& weights, uint32_t address, int g, int t,
                                float (&sum)[T::kSums][4]) {
  uint32_t b[4];
  gpu::load_matrices(address + State * kBatchTile * ClusterShared<T, true>::kOwnStride * 2, b);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    weights.template multiply_parts<State>(sum, g, t + j, b[2 * j], b[2 * j + 1]);
  }
  if constexpr (State + 1 < T::kParts) multiply_own<T, State + 1>(weights, address, g, t, sum);
}

// this block's share of the gradient of every unit, to the units' owners
template <class T>
FASTLM_DEVICE void send_shares(const Weights<T, true>& weights, const Place& place, int blocks,
                               const unsigned char* own, uint32_t received, uint32_t signal) {
  constexpr int kTilesOfWarp = T::kDepth / 16 / kWarps;
  const uint32_t address =
      matrix_address(gpu::shared_address(own), ClusterShared<T, true>::kOwnStride, 0);
#pragma unroll
  for (int m = 0; m < kTilesOfWarp; ++m) {
    float sum[T::kSums][4];
    clear(sum);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int k = 0; k < T::kGroups; k += 2) {
        multiply_own<T, 0>(weights, address + (g * T::kUnits + k * 16) * 2, g, m * T::kGroups + k,
                           sum);
      }
    }
    if constexpr (T::kSums > 1) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[0][q] += sum[1][q];
    }
    const int first = (place.warp * kTilesOfWarp + m) * 16, rank = first / T::kUnits;
    if (rank >= blocks) continue;
    const int unit = first % T::kUnits + place.lane / 4;
    const uint32_t to = gpu::address_in_block(
        received + ((place.rank * T::kUnits + unit) * kBatchTile + place.lane % 4 * 2) * 4, rank);
    const uint32_t its_signal = gpu::address_in_block(signal, rank);
    gpu::store_remote(to, its_signal, sum[0][0], sum[0][1]);
    gpu::store_remote(to + 8 * kBatchTile * 4, its_signal, sum[0][2], sum[0][3]);
  }
}

template <class T>
FASTLM_DEVICE void run_backward(const GruCudaBackward& a, const Place& place, int blocks) {
  using Memory = ClusterShared<T, true>;
  const int steps = int(a.shape.steps);
  const int64_t hidden = a.shape.hidden, width = gru_exchange_width(hidden);
  const Memory shared;
  const Pair pair = Pair::of<T>(place, hidden);
  const int64_t row = place.first_row + pair.row;
  const bool owns = place.warp < T::kPairs / gpu::kLanesOfWarp;
  Weights<T, true> weights;
  shared.load(weights, place.warp, [&](int g, int t, int m, int k) {
    const int unit = place.rank * T::kUnits + t % T::kGroups * 16 + k;
    const int column = (place.warp * (T::kDepth / 16 / kWarps) + t / T::kGroups) * 16 + m;
    return weight_at(a.w_hh, hidden, g, unit, column);
  });
  float d[2];
  Saved saved;
  load_pair(a.dh_n + row * hidden + pair.unit, pair.count, d);
  saved.load(a, pair, row, steps - 1);
  const float* received = reinterpret_cast<const float*>(shared.sums);
  gpu::cluster_barrier();

  for (int step = steps - 1, i = 0; step >= 0; --step, ++i) {
    const int64_t n = token(a.shape, row, step);
    const uint32_t signal = shared.signals + 8 * (i & 1);
    unsigned char* own = shared.operand + (i & 1) * Memory::kOwn;
    if (gpu::thread_index() == 0) {
      gpu::signal_expect(signal, blocks * T::kUnits * kBatchTile * 4);
    }
    if (owns) {
      GateGradients grad[2];
      step_back(pair, saved, d, grad);
      store_own<T>(own, pair, 0, grad[0].dr, grad[1].dr);
      store_own<T>(own, pair, 1, grad[0].dz, grad[1].dz);
      store_own<T>(own, pair, 2, grad[0].dnr, grad[1].dnr);
      if (pair.count > 0) store_gradients(a, pair, n, grad);
      if (T::kParts > 1 && pair.writes) {
        const int64_t at = n * kGates * width + pair.unit;
        store_output<T>(a.exchange, at, grad[0].dr, grad[1].dr);
        store_output<T>(a.exchange, at + width, grad[0].dz, grad[1].dz);
        store_output<T>(a.exchange, at + 2 * width, grad[0].dnr, grad[1].dnr);
      }
      if (step > 0) saved.load(a, pair, row, step - 1);
    }
    gpu::barrier();
    const int buffer = (i & 1) * Memory::kReceived;
    send_shares(weights, place, blocks, own, gpu::shared_address(received + buffer), signal);
    gpu::signal_wait(signal, i >> 1 & 1);
    if (!owns) continue;
    const float* p = received + buffer + pair.local * kBatchTile + pair.row;
    for (int rank = 0; rank < blocks; ++rank, p += T::kUnits * kBatchTile) {
      d[0] += p[0];
      d[1] += p[kBatchTile];
    }
    // nothing flows back past the start of a document
    if (pair.count > 0 && a.reset && a.reset[n]) d[0] = d[1] = 0.f;
  }
  store_pair(a.dh0 + row * hidden + pair.unit, pair.count, d[0], d[1]);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_cluster_kernel(const __grid_constant__ ClusterArgs<GruCudaBackward> launch) {
  const Place place = place_in_cluster(launch.args.shape.batch, gpu::cluster_size());
  if (place.rank < launch.blocks) {
    run_backward<T>(launch.args, place, launch.blocks);
  } else {
    gpu::cluster_barrier();
  }
  gpu::cluster_barrier();
}

}  // namespace

GruCudaFit backward_cluster_fit(int64_t hidden, int parts) {
  if (hidden > largest_hidden(parts)) return {0, "the hidden size is too large for a cluster"};
  return with_cluster_tiling(hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return cluster_fit<T, true>(&backward_cluster_kernel<T>, hidden);
  });
}

}  // namespace gru

cudaError_t gru_backward_cluster(const GruCudaBackward& args, int parts, cudaStream_t stream) {
  if (args.shape.hidden > gru::largest_hidden(parts)) return cudaErrorNotSupported;
  return gru::with_cluster_tiling(args.shape.hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return gru::run_clusters<T, true>(&gru::backward_cluster_kernel<T>, args, stream);
  });
}

}  // namespace fastlm
