// The forward in clusters of blocks: see embedding_gru_cluster.h.
#include "embedding_gru/embedding_gru_cluster.h"

namespace fastlm {
namespace gru {
namespace {

FASTLM_DEVICE bool starts_afresh(const uint8_t* reset, const GruShape& s, const Pair& pair,
                                 int64_t row, int step) {
  if (!reset || pair.count == 0 || step >= int(s.steps)) return false;
  return reset[token(s, row, step)] != 0;
}

// h0 of all rows, rounded as the operands are
template <class T>
FASTLM_DEVICE void load_initial_states(const GruCudaForward& a, const Place& place,
                                       unsigned char* states) {
  const int hidden = int(a.shape.hidden);
  if (place.warp >= place.rows || !a.h0) return;
  const int64_t row = place.first_row + place.warp;
  if (a.reset && a.reset[token(a.shape, row, 0)]) return;
  const float* h0 = a.h0 + row * hidden;
  for (int u = place.lane * 2; u < hidden; u += 2 * gpu::kLanesOfWarp) {
    const float v0 = h0[u], v1 = u + 1 < hidden ? h0[u + 1] : 0.f;
    const int at = place.warp * T::kStateStride + u;
    if (T::kParts == 1) {
      reinterpret_cast<uint32_t*>(states)[at / 2] = gpu::pack_bfloat16(v0, v1);
    } else {
      reinterpret_cast<float*>(states)[at] = v0;
      reinterpret_cast<float*>(states)[at + 1] = v1;
    }
  }
}

template <class T, int State>
FASTLM_DEVICE void multiply_split(const Weights<T, false>& weights, int t,
                                  const uint32_t (&low)[T::kParts],
                                  const uint32_t (&high)[T::kParts],
                                  float (&sum)[kGates][T::kSums][4]) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    weights.template multiply_parts<State>(sum[g], g, t, low[State], high[State]);
  }
  if constexpr (State + 1 < T::kParts) multiply_split<T, State + 1>(weights, t, low, high, sum);
}

// multiply_tile for a state in float32, [row][kStateStride], which is split on the way
template <class T>
FASTLM_DEVICE void multiply_floats(const Weights<T, false>& weights, const float* state,
                                   float (&sum)[kGates][T::kSums][4]) {
  const int lane = gpu::thread_index() % gpu::kLanesOfWarp;
  state += lane / 4 * T::kStateStride + lane % 4 * 2;
#pragma unroll
  for (int g = 0; g < kGates; ++g) clear(sum[g]);
#pragma unroll
  for (int t = 0; t < T::kTiles; ++t, state += 16) {
    uint32_t low[T::kParts], high[T::kParts];
    split_pair(state[0], state[1], low);
    split_pair(state[8], state[9], high);
    multiply_split<T, 0>(weights, t, low, high, sum);
  }
}

// the product of the weights with the state of this step, into the shares of the sums
template <class T>
FASTLM_DEVICE void multiply_state(const Weights<T, false>& weights, const Place& place,
                                  const unsigned char* state, float* sums) {
  const int group = place.warp % T::kGroups, share = place.warp / T::kGroups;
  const int first_k = share * T::kTiles * 16;
  float sum[kGates][T::kSums][4];
  if constexpr (T::kParts == 1) {
    const uint32_t address = gpu::shared_address(state);
    multiply_tile(weights, matrix_address(address, T::kStateStride, first_k), sum);
  } else {
    multiply_floats(weights, reinterpret_cast<const float*>(state) + first_k, sum);
  }
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    if constexpr (T::kSums > 1) {
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[g][0][q] += sum[g][1][q];
    }
    store_fragment(sums + ((share * kGates + g) * T::kUnits + group * 16) * kSumStride, sum[g][0]);
  }
}

// Sends a warp's new states to all blocks, 16 bytes at a time. Lanes in groups: each lane of a
// group has one vector, each group other receivers.
template <class T>
FASTLM_DEVICE void send_states(const Place& place, int blocks, uint32_t states, uint32_t signal,
                               float h0, float h1) {
  constexpr int kLanesOfVector = T::kParts == 1 ? 4 : 2;
  constexpr int kVectors = gpu::kLanesOfWarp / kLanesOfVector;
  const int first = place.lane % kVectors * kLanesOfVector;
  uint32_t v[4];
  if constexpr (T::kParts == 1) {
    const uint32_t own = gpu::pack_bfloat16(h0, h1);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = gpu::shuffle(own, first + i);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = gpu::shuffle(gpu::bits_of_float(i % 2 ? h1 : h0), first + i / 2);
    }
  }
  const int pair = place.warp * gpu::kLanesOfWarp + first, pairs = T::kUnits / 2;
  const int at = pair / pairs * T::kStateStride + place.rank * T::kUnits + pair % pairs * 2;
  const uint32_t to = states + at * ClusterShared<T, false>::kStateBytes;
  for (int rank = place.lane / kVectors; rank < blocks; rank += kLanesOfVector) {
    gpu::store_remote(gpu::address_in_block(to, rank), gpu::address_in_block(signal, rank), v);
  }
}

template <class T>
FASTLM_DEVICE void run_forward(const GruCudaForward& a, const Place& place, int blocks) {
  using Memory = ClusterShared<T, false>;
  const int steps = int(a.shape.steps);
  const int64_t hidden = a.shape.hidden, width = gru_exchange_width(hidden);
  const Memory shared;
  const Pair pair = Pair::of<T>(place, hidden);
  const int64_t row = place.first_row + pair.row;
  Weights<T, false> weights;
  const int first_unit = place.rank * T::kUnits + place.warp % T::kGroups * 16;
  const int first_k = place.warp / T::kGroups * T::kTiles * 16;
  shared.load(weights, place.warp, [&](int g, int t, int m, int k) {
    return weight_at(a.w_hh, hidden, g, first_unit + m, first_k + t * 16 + k);
  });
  load_initial_states<T>(a, place, shared.operand);
  ForwardUnits units;
  units.start(a, pair, row);
  bool starts = starts_afresh(a.reset, a.shape, pair, row, 0);
  bool next_starts = starts_afresh(a.reset, a.shape, pair, row, 1);
  float* sums = reinterpret_cast<float*>(shared.sums);
  // nobody sends before all have started their signals
  gpu::cluster_barrier();

  for (int step = 0; step < steps; ++step) {
    const int now = step & 1, next = now ^ 1;
    if (gpu::thread_index() == 0 && step + 1 < steps) {
      gpu::signal_expect(shared.signals + 8 * next,
                         kBatchTile * blocks * T::kUnits * Memory::kStateBytes);
    }
    if (step > 0) gpu::signal_wait(shared.signals + 8 * now, (step - 1) >> 1 & 1);
    multiply_state(weights, place, shared.operand + now * Memory::kStates, sums);
    gpu::barrier();
    if (place.warp >= T::kPairs / gpu::kLanesOfWarp) continue;
    if (starts) units.h[0] = units.h[1] = 0.f;
    Gates gates[2] = {};
    if (pair.count > 0) {
      float s[2][kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        s[0][g] = units.bias[g][0];
        s[1][g] = units.bias[g][1];
#pragma unroll
        for (int i = 0; i < T::kShares; ++i) {
          const float* p =
              sums + ((i * kGates + g) * T::kUnits + pair.local) * kSumStride + pair.row;
          s[0][g] += p[0];
          s[1][g] += p[kSumStride];
        }
      }
      units.advance(pair, s, gates);
    }
    // The sums are free once this warp's states have arrived, for which the next step waits. The
    // buffer is free: who has sent this step's states has read the ones before.
    if (step + 1 < steps) {
      const uint32_t states = gpu::shared_address(shared.operand) + next * Memory::kStates;
      send_states<T>(place, blocks, states, shared.signals + 8 * next,
                     next_starts ? 0.f : units.h[0], next_starts ? 0.f : units.h[1]);
    }
    if (pair.writes) {
      store_output<T>(a.exchange, token(a.shape, row, step) * width + pair.unit, units.h[0],
                      units.h[1]);
    }
    if (pair.count > 0) units.finish(a, pair, row, step, gates);
    starts = next_starts;
    next_starts = starts_afresh(a.reset, a.shape, pair, row, step + 2);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_cluster_kernel(const __grid_constant__ ClusterArgs<GruCudaForward> launch) {
  const Place place = place_in_cluster(launch.args.shape.batch, gpu::cluster_size());
  if (place.rank < launch.blocks) {
    run_forward<T>(launch.args, place, launch.blocks);
  } else {
    gpu::cluster_barrier();
  }
  // shared memory stays while others may write to it
  gpu::cluster_barrier();
}

}  // namespace

GruCudaFit forward_cluster_fit(int64_t hidden, int parts) {
  if (hidden > largest_hidden(parts)) return {0, "the hidden size is too large for a cluster"};
  return with_cluster_tiling(hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return cluster_fit<T, false>(&forward_cluster_kernel<T>, hidden);
  });
}

}  // namespace gru

cudaError_t gru_forward_cluster(const GruCudaForward& args, int parts, cudaStream_t stream) {
  if (args.shape.hidden > gru::largest_hidden(parts)) return cudaErrorNotSupported;
  return gru::with_cluster_tiling(args.shape.hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return gru::run_clusters<T, false>(&gru::forward_cluster_kernel<T>, args, stream);
  });
}

}  // namespace fastlm
