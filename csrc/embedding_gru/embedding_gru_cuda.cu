// The forward with an exchange through global memory: see embedding_gru_persistent.h.
#include "embedding_gru/embedding_gru_persistent.h"

namespace fastlm {
namespace gru {
namespace {

// what a row starts from before the first step; columns past H are zero already
template <class T>
FASTLM_DEVICE void load_initial_state(const Shared<T, false>& shared, const Place& place, int row,
                                      const float* h0, int64_t hidden) {
  unsigned char* to = state_row(shared, row);
  for (int u = place.lane * 2; u < hidden; u += 2 * gpu::kLanesOfWarp) {
    uint32_t parts[T::kParts];
    split_pair(h0[u], u + 1 < hidden ? h0[u + 1] : 0.f, parts);
#pragma unroll
    for (int i = 0; i < T::kParts; ++i) {
      *reinterpret_cast<uint32_t*>(to + (i * kBatchTile * T::kStateStride + u) * 2) = parts[i];
    }
  }
}

template <class T>
FASTLM_DEVICE void clear_row(const Shared<T, false>& shared, const Place& place, int row) {
  unsigned char* to = state_row(shared, row);
  for (int i = 0; i < T::kParts; ++i) {
    uint4* part = reinterpret_cast<uint4*>(to + i * kBatchTile * T::kStateStride * 2);
    for (int c = place.lane; c < T::kDepth / 8; c += gpu::kLanesOfWarp) part[c] = uint4{0, 0, 0, 0};
  }
}

// what every row of the slice starts a step from, into shared memory
template <class T>
FASTLM_DEVICE void gather_states(const GruCudaForward& a, const Shared<T, false>& shared,
                                 const Place& place, int step, const unsigned char* starts) {
  const int64_t width = gru_exchange_width(a.shape.hidden);
  constexpr int kBytes = T::kParts == 1 ? 2 : 4;
  for (int row = place.warp; row < place.rows; row += kWarps) {
    const int64_t b = place.first_row + row;
    if (a.reset && starts[row]) {
      clear_row(shared, place, row);
    } else if (step > 0) {
      const auto* from = static_cast<const unsigned char*>(a.exchange) +
                         token(a.shape, b, step - 1) * width * kBytes;
      gather_row(shared, place, row, from, 1, int(width * kBytes / 16));
    } else if (a.h0) {
      load_initial_state(shared, place, row, a.h0 + b * a.shape.hidden, a.shape.hidden);
    }
  }
}

// whether the thread's row starts afresh at `step`; 0 past the end
FASTLM_DEVICE unsigned char reset_at(const uint8_t* reset, const GruShape& s, const Place& place,
                                     int step) {
  const int row = gpu::thread_index();
  if (!reset || row >= place.rows || step < 0 || step >= int(s.steps)) return 0;
  return reset[token(s, place.first_row + row, step)];
}

// product of the weights and the states in shared memory, into the shares of the sums
template <class T>
FASTLM_DEVICE void multiply_states(const Weights<T, false>& weights, const Shared<T, false>& shared,
                                   const Place& place, int row_tiles) {
  const int group = place.warp % T::kGroups, share = place.warp / T::kGroups;
  uint32_t address =
      matrix_address(gpu::shared_address(shared.states), T::kStateStride, share * T::kTiles * 16);
  float* sums = shared.sums + (share * kGates * T::kUnits + group * 16) * kSumStride;
  for (int tile = 0; tile < row_tiles; ++tile) {
    if (tile * kBatchTile >= place.rows) break;
    float sum[kGates][T::kSums][4];
    multiply_tile(weights, address, sum);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      if constexpr (T::kSums > 1) {
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[g][0][q] += sum[g][1][q];
      }
      store_fragment(sums + g * T::kUnits * kSumStride, sum[g][0]);
    }
    address += Shared<T, false>::kTileBytes;
    sums += Shared<T, false>::kTileSums;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ Launch<GruCudaForward> launch) {
  const GruCudaForward& a = launch.args;
  const int steps = int(a.shape.steps);
  const int64_t hidden = a.shape.hidden, width = gru_exchange_width(hidden);
  const Shared<T, false> shared(launch.slices.row_tiles);
  const Place place = place_of(launch.slices);
  const Pair pair = Pair::of<T>(place, hidden);
  const int64_t row = place.first_row + pair.row;
  const int max_rows = launch.slices.row_tiles * kBatchTile;

  Weights<T, false> weights;
  const int first_unit = place.rank * T::kUnits + place.warp % T::kGroups * 16;
  const int first_k = place.warp / T::kGroups * T::kTiles * 16;
  weights.load(
      [&](int g, int t, int m, int k) {
        return weight_at(a.w_hh, hidden, g, first_unit + m, first_k + t * 16 + k);
      },
      shared.loose + place.warp * kGates * T::kLoose * gpu::kLanesOfWarp, shared.stage(place.warp));
  gpu::barrier();
  clear_states(shared, launch.slices.row_tiles);
  ForwardUnits units;
  units.start(a, pair, row);
  unsigned char next_start = reset_at(a.reset, a.shape, place, 0);
  if (gpu::thread_index() < max_rows) shared.starts[gpu::thread_index()] = next_start;
  next_start = reset_at(a.reset, a.shape, place, 1);
  gpu::barrier();

  for (int step = 0; step < steps; ++step) {
    const unsigned char* starts = shared.starts + (step & 1) * max_rows;
    gather_states(a, shared, place, step, starts);
    gpu::barrier();
    multiply_states(weights, shared, place, launch.slices.row_tiles);
    // read after the next barrier, and by the next step's gathering, which comes later still
    if (gpu::thread_index() < max_rows) {
      shared.starts[((step + 1) & 1) * max_rows + gpu::thread_index()] = next_start;
    }
    next_start = reset_at(a.reset, a.shape, place, step + 2);
    gpu::barrier();
    if (!pair.writes) continue;
    Gates gates[2] = {};
    if (pair.count > 0) {
      if (a.reset && starts[pair.row]) units.h[0] = units.h[1] = 0.f;
      float s[2][kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        s[0][g] = units.bias[g][0];
        s[1][g] = units.bias[g][1];
        add_shares(shared, pair, g, s[0][g], s[1][g]);
      }
      units.advance(pair, s, gates);
    }
    publish<T::kParts>(a.exchange, token(a.shape, row, step) * width + pair.unit, units.h[0],
                       units.h[1]);
    if (pair.count > 0) units.finish(a, pair, row, step, gates);
  }
}

}  // namespace

GruCudaFit forward_fit(int64_t hidden, int parts) {
  return with_tiling(hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return fit<T, false>(&forward_kernel<T>, hidden);
  });
}

}  // namespace gru

cudaError_t gru_forward_cuda(const GruCudaForward& args, int parts, cudaStream_t stream) {
  return gru::with_tiling(args.shape.hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return gru::run<T, false>(&gru::forward_kernel<T>, args, stream);
  });
}

}  // namespace fastlm
