// Persistent kernels without a barrier across the grid. For each slice of the batch, H / kUnits
// blocks hold the recurrent weights in registers over all steps and read each other's states from
// global memory as they appear there: the data are their own flags, so that neither their order
// nor torn vectors matter. All blocks must be on the device at once, hence the cooperative launch.
//
// Source: data that carry their own validity, from Lamport (CACM 1977) through "Sparse Persistent
// RNNs", Zhu et al. 2018 (arXiv:1804.10223); weights in registers, "Persistent RNNs", Diamos et
// al. 2016 (ICML).
#pragma once

#include "embedding_gru/embedding_gru_units.h"

namespace fastlm {
namespace gru {

struct Slices {
  int64_t first_row, last_row;  // of the batch, in this launch
  int row_tiles;                // batch tiles of a slice
  int blocks;                   // of a slice
};

template <class Args>
struct Launch {
  Args args;
  Slices slices;
};

template <class T, bool Backward>
struct Shared {
  static constexpr int kStride = Backward ? T::kGradStride : T::kStateStride;
  static constexpr int kTileBytes = T::kParts * kBatchTile * kStride * 2;
  // of one batch tile: [share][kSumGates][unit][kSumStride]; the backward sums over gates as well,
  // at once or at the end
  static constexpr int kSumGates = Backward ? kGates / T::kGatesAtOnce : kGates;
  static constexpr int kSumRows = kSumGates * T::kUnits;
  static constexpr int kTileSums = T::kShares * kSumRows * kSumStride;

  uint4* loose;           // [warp][gate][kLoose][lane]: weights that are not in registers
  unsigned char* states;  // [batch tile][part][row][kStride] bfloat16
  float* sums;            // [batch tile][kTileSums]
  unsigned char* starts;  // [2][rows]: this step's reset and the next one's

  FASTLM_DEVICE explicit Shared(int row_tiles) {
    unsigned char* p = gpu::dynamic_shared();
    loose = reinterpret_cast<uint4*>(p);
    states = p + T::kLooseBytes;
    sums = reinterpret_cast<float*>(states + row_tiles * kTileBytes);
    starts = reinterpret_cast<unsigned char*>(sums + row_tiles * kTileSums);
  }
  // where a warp's weights pass through before the first step
  FASTLM_DEVICE uint4* stage(int warp) const {
    constexpr int kVectors = kStagedTiles * T::kParts * gpu::kLanesOfWarp;
    static_assert(kWarps * kVectors * 16 <= kTileBytes + kTileSums * 4, "the stage is too large");
    return reinterpret_cast<uint4*>(states) + warp * kVectors;
  }
  static constexpr size_t bytes(int row_tiles) {
    return size_t(T::kLooseBytes) +
           size_t(row_tiles) * (kTileBytes + kTileSums * 4 + 2 * kBatchTile);
  }
};

FASTLM_DEVICE Place place_of(const Slices& s) {
  const int slice = gpu::block_index() / s.blocks, most = s.row_tiles * kBatchTile;
  return Place(gpu::block_index() % s.blocks, s.first_row + int64_t(slice) * most, s.last_row,
               most);
}

template <int Parts>
FASTLM_DEVICE bool is_missing(const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  bool missing = false;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    missing |= Parts == 1 ? (words[i] & 0xffffu) == 0xffffu || words[i] >> 16 == 0xffffu
                          : words[i] == 0xffffffffu;
  }
  return missing;
}

// writes two neighbouring values for the other blocks
template <int Parts>
FASTLM_DEVICE void publish(void* exchange, int64_t at, float v0, float v1) {
  if (Parts == 1) {
    uint32_t v = gpu::pack_bfloat16(v0, v1);
    if (v0 != v0) v = (v & 0xffff0000u) | 0x7fffu;
    if (v1 != v1) v = (v & 0xffffu) | 0x7fff0000u;
    gpu::store_relaxed(static_cast<uint16_t*>(exchange) + at, v);
  } else {
    gpu::store_relaxed(static_cast<float*>(exchange) + at,
                       v0 == v0 ? gpu::bits_of_float(v0) : 0x7fffffffu,
                       v1 == v1 ? gpu::bits_of_float(v1) : 0x7fffffffu);
  }
}

// one vector of `exchange` to the parts of the operand; `part_bytes` from one part to the next
template <int Parts>
FASTLM_DEVICE void store_vector(unsigned char* to, int part_bytes, const uint4& v) {
  if constexpr (Parts == 1) {
    *reinterpret_cast<uint4*>(to) = v;
  } else {
    uint32_t low[Parts], high[Parts];
    split_pair(gpu::float_of_bits(v.x), gpu::float_of_bits(v.y), low);
    split_pair(gpu::float_of_bits(v.z), gpu::float_of_bits(v.w), high);
#pragma unroll
    for (int i = 0; i < Parts; ++i) {
      *reinterpret_cast<uint2*>(to + i * part_bytes) = uint2{low[i], high[i]};
    }
  }
}

template <class T, bool Backward>
FASTLM_DEVICE unsigned char* state_row(const Shared<T, Backward>& shared, int row) {
  return shared.states + row / kBatchTile * Shared<T, Backward>::kTileBytes +
         row % kBatchTile * Shared<T, Backward>::kStride * 2;
}

// Waits for `gates` x `vectors` vectors of one row and puts them into shared memory, each gate at
// kDepth columns; all lanes of a warp.
template <class T, bool Backward>
FASTLM_DEVICE void gather_row(const Shared<T, Backward>& shared, const Place& place, int row,
                              const unsigned char* from, int gates, int vectors) {
  constexpr int kElements = T::kParts == 1 ? 8 : 4;
  constexpr int kMost = (Backward ? T::kGatesAtOnce : 1) * T::kDepth / kElements;
  constexpr int kRounds = (kMost + gpu::kLanesOfWarp - 1) / gpu::kLanesOfWarp;
  constexpr int kAtOnce = kRounds < T::kInFlight ? kRounds : T::kInFlight;
  constexpr int kPartBytes = kBatchTile * Shared<T, Backward>::kStride * 2;
  unsigned char* to = state_row(shared, row);
  const int all = gates * vectors;
  for (int first = place.lane; first < all; first += kAtOnce * gpu::kLanesOfWarp) {
    uint4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * gpu::kLanesOfWarp;
      if (at < all) v[i] = gpu::load_relaxed(from + at * 16);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * gpu::kLanesOfWarp;
      if (at >= all) continue;
      for (int polls = 0; is_missing<T::kParts>(v[i]); ++polls) {
        if (polls == gpu::kMaxPolls) gpu::stop();
        v[i] = gpu::load_relaxed(from + at * 16);
      }
      const int g = Backward ? (at >= vectors) + (at >= 2 * vectors) : 0;
      const int column = g * T::kDepth + (at - g * vectors) * kElements;
      store_vector<T::kParts>(to + column * 2, kPartBytes, v[i]);
    }
  }
}

template <class T, bool Backward>
FASTLM_DEVICE void clear_states(const Shared<T, Backward>& shared, int row_tiles) {
  uint4* p = reinterpret_cast<uint4*>(shared.states);
  const int count = row_tiles * Shared<T, Backward>::kTileBytes / 16;
  for (int i = gpu::thread_index(); i < count; i += kThreads) p[i] = uint4{0, 0, 0, 0};
}

// the sums of both units over the shares of the warps, in order
template <class T, bool Backward>
FASTLM_DEVICE void add_shares(const Shared<T, Backward>& shared, const Pair& pair, int g, float& s0,
                              float& s1) {
  const float* p = shared.sums + pair.row / kBatchTile * Shared<T, Backward>::kTileSums +
                   (g * T::kUnits + pair.local) * kSumStride + pair.row % kBatchTile;
#pragma unroll
  for (int i = 0; i < T::kShares; ++i) {
    s0 += p[i * Shared<T, Backward>::kSumRows * kSumStride];
    s1 += p[i * Shared<T, Backward>::kSumRows * kSumStride + kSumStride];
  }
}

// Runs `action` with the tiling for a hidden size, the smallest that holds it. Of 192 registers for
// weights a thread has too few left for the rest: such a tiling keeps a quarter or more in shared
// memory.
template <class Action>
auto with_tiling(int64_t hidden, int parts, const Action& action) {
  if (parts == 1) {
    if (hidden <= 256) return action(Tiling<1, 2, 4>{});
    if (hidden <= 512) return action(Tiling<1, 2, 8>{});
    if (hidden <= 1024) return action(Tiling<1, 2, 16, 12>{});
    return action(Tiling<1, 1, 16, 12>{});
  }
  if (parts == 2) {
    if (hidden <= 256) return action(Tiling<2, 1, 2>{});
    if (hidden <= 512) return action(Tiling<2, 1, 4>{});
    return action(Tiling<2, 1, 8, 5>{});
  }
  if (hidden <= 256) return action(Tiling<3, 1, 2>{});
  if (hidden <= 512) return action(Tiling<3, 1, 4>{});
  return action(Tiling<3, 1, 8, 6>{});
}

struct Device {
  int multiprocessors, shared, cooperative;

  cudaError_t read() {
    int id = 0;
    cudaError_t e = cudaGetDevice(&id);
    if (e == cudaSuccess) {
      e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id);
    }
    if (e == cudaSuccess) {
      e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
    }
    if (e == cudaSuccess) {
      e = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, id);
    }
    return e;
  }
};

struct Plan {
  cudaError_t error;
  const char* reason;  // why nothing fits, or null
  int row_tiles, blocks;
  int64_t slices;  // at once

  int64_t rows() const { return slices * row_tiles * kBatchTile; }
};

// the fewest rows a slice that hold `batch` in one launch, or as many rows as there can be
template <class T, bool Backward, class Args>
Plan plan(void (*kernel)(Launch<Args>), int64_t hidden, int64_t batch) {
  Plan best{cudaSuccess, nullptr, 0, 0, 0};
  Device device;
  best.error = device.read();
  if (best.error != cudaSuccess) return best;
  best.reason = hidden > T::kDepth    ? "the hidden size is too large for this precision"
                : !device.cooperative ? "the device has no cooperative launch"
                                      : nullptr;
  if (best.reason) return best;
  const int blocks = int((gru_exchange_width(hidden) + T::kUnits - 1) / T::kUnits);
  for (int tiles = 1; tiles <= T::kMaxRowTiles && best.rows() < batch; ++tiles) {
    const size_t bytes = Shared<T, Backward>::bytes(tiles);
    if (bytes > size_t(device.shared)) break;
    best.error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
    int resident = 0;
    if (best.error == cudaSuccess) {
      best.error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes);
    }
    if (best.error != cudaSuccess) return best;
    const int64_t slices = int64_t(resident) * device.multiprocessors / blocks;
    if (slices * tiles * kBatchTile > best.rows()) {
      best.row_tiles = tiles;
      best.blocks = blocks;
      best.slices = slices;
    }
  }
  if (best.slices == 0) best.reason = "the device cannot hold the recurrent weights on chip";
  return best;
}

template <class T, bool Backward, class Args>
cudaError_t run(void (*kernel)(Launch<Args>), const Args& args, cudaStream_t stream) {
  const int64_t batch = args.shape.batch;
  if (args.shape.steps > INT32_MAX) return cudaErrorInvalidValue;
  const Plan p = plan<T, Backward>(kernel, args.shape.hidden, batch);
  if (p.error != cudaSuccess) return p.error;
  if (p.reason) return cudaErrorNotSupported;
  const int64_t width = gru_exchange_width(args.shape.hidden) * (Backward ? kGates : 1);
  const int64_t bytes = batch * args.shape.steps * width * (T::kParts == 1 ? 2 : 4);
  cudaError_t e = cudaMemsetAsync(args.exchange, 0xff, size_t(bytes), stream);
  for (int64_t row = 0; row < batch && e == cudaSuccess; row += p.rows()) {
    const int64_t last = row + p.rows() < batch ? row + p.rows() : batch;
    const int64_t of_slice = p.row_tiles * kBatchTile;
    const int64_t slices = (last - row + of_slice - 1) / of_slice;
    const Launch<Args> launch{args, {row, last, p.row_tiles, p.blocks}};
    e = gpu::launch_cooperative(kernel, int(slices * p.blocks), kThreads,
                                Shared<T, Backward>::bytes(p.row_tiles), stream, launch);
  }
  return e;
}

// in one launch, at the most
template <class T, bool Backward, class Args>
GruCudaFit fit(void (*kernel)(Launch<Args>), int64_t hidden) {
  const Plan p = plan<T, Backward>(kernel, hidden, INT64_MAX);
  if (p.error != cudaSuccess) return {0, cudaGetErrorString(p.error)};
  return {p.rows(), p.reason};
}

}  // namespace gru
}  // namespace fastlm
