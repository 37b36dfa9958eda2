// The backward with an exchange through global memory: see embedding_gru_persistent.h. Every block
// gathers all gradients of a step's gates and computes those of its own units' state.
#include "embedding_gru/embedding_gru_persistent.h"

namespace fastlm {
namespace gru {
namespace {

// Gathers the gradients of gates FirstGate.. of one step and multiplies them with the weights.
template <class T, int FirstGate>
FASTLM_DEVICE void add_gates(const GruCudaBackward& a, const Weights<T, true>& weights,
                             const Shared<T, true>& shared, const Place& place, int row_tiles,
                             int step) {
  const int64_t width = gru_exchange_width(a.shape.hidden);
  constexpr int kBytes = T::kParts == 1 ? 2 : 4;
  for (int row = place.warp; row < place.rows; row += kWarps) {
    const int64_t n = token(a.shape, place.first_row + row, step);
    const auto* from =
        static_cast<const unsigned char*>(a.exchange) + (n * kGates + FirstGate) * width * kBytes;
    gather_row(shared, place, row, from, T::kGatesAtOnce, int(width * kBytes / 16));
  }
  gpu::barrier();
  const int group = place.warp % T::kGroups, share = place.warp / T::kGroups;
  uint32_t address =
      matrix_address(gpu::shared_address(shared.states), T::kGradStride, share * T::kTiles * 16);
  float* sums = shared.sums + (share * Shared<T, true>::kSumRows +
                               FirstGate / T::kGatesAtOnce * T::kUnits + group * 16) *
                                  kSumStride;
  for (int tile = 0; tile < row_tiles; ++tile) {
    if (tile * kBatchTile >= place.rows) break;
    float total[4];
    multiply_tile<T, FirstGate>(weights, address, total);
    store_fragment(sums, total);
    address += Shared<T, true>::kTileBytes;
    sums += Shared<T, true>::kTileSums;
  }
  // what is gathered next goes where these gradients are
  gpu::barrier();
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Launch<GruCudaBackward> launch) {
  const GruCudaBackward& a = launch.args;
  const int steps = int(a.shape.steps);
  const int64_t hidden = a.shape.hidden, width = gru_exchange_width(hidden);
  const Shared<T, true> shared(launch.slices.row_tiles);
  const Place place = place_of(launch.slices);
  const Pair pair = Pair::of<T>(place, hidden);
  const int64_t row = place.first_row + pair.row;

  Weights<T, true> weights;
  const int first_unit = place.rank * T::kUnits + place.warp % T::kGroups * 16;
  const int first_k = place.warp / T::kGroups * T::kTiles * 16;
  weights.load(
      [&](int g, int t, int m, int k) {
        return weight_at(a.w_hh, hidden, g, first_k + t * 16 + k, first_unit + m);
      },
      shared.loose + place.warp * kGates * T::kLoose * gpu::kLanesOfWarp, shared.stage(place.warp));
  gpu::barrier();
  clear_states(shared, launch.slices.row_tiles);
  float d[2];
  Saved saved;
  load_pair(a.dh_n + row * hidden + pair.unit, pair.count, d);
  if (pair.writes) saved.load(a, pair, row, steps - 1);
  gpu::barrier();

  for (int step = steps - 1; step >= 0; --step) {
    const int64_t n = token(a.shape, row, step);
    if (pair.writes) {
      GateGradients grad[2];
      step_back(pair, saved, d, grad);
      const int64_t at = n * kGates * width + pair.unit;
      publish<T::kParts>(a.exchange, at, grad[0].dr, grad[1].dr);
      publish<T::kParts>(a.exchange, at + width, grad[0].dz, grad[1].dz);
      publish<T::kParts>(a.exchange, at + 2 * width, grad[0].dnr, grad[1].dnr);
      store_gradients(a, pair, n, grad);
      if (step > 0) saved.load(a, pair, row, step - 1);
    }
    add_gates<T, 0>(a, weights, shared, place, launch.slices.row_tiles, step);
    if constexpr (T::kGatesAtOnce < kGates) {
      add_gates<T, 1>(a, weights, shared, place, launch.slices.row_tiles, step);
      add_gates<T, 2>(a, weights, shared, place, launch.slices.row_tiles, step);
    }
    if (pair.count == 0) continue;
    if (a.reset && a.reset[n]) {
      // nothing flows back past the start of a document
      d[0] = d[1] = 0.f;
    } else {
      float s[2] = {0.f, 0.f};
#pragma unroll
      for (int g = 0; g < Shared<T, true>::kSumGates; ++g) add_shares(shared, pair, g, s[0], s[1]);
      d[0] += s[0];
      d[1] += s[1];
    }
  }
  store_pair(a.dh0 + row * hidden + pair.unit, pair.count, d[0], d[1]);
}

}  // namespace

GruCudaFit backward_fit(int64_t hidden, int parts) {
  return with_tiling(hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return fit<T, true>(&backward_kernel<T>, hidden);
  });
}

}  // namespace gru

cudaError_t gru_backward_cuda(const GruCudaBackward& args, int parts, cudaStream_t stream) {
  return gru::with_tiling(args.shape.hidden, parts, [&](auto tiling) {
    using T = decltype(tiling);
    return gru::run<T, true>(&gru::backward_kernel<T>, args, stream);
  });
}

}  // namespace fastlm
