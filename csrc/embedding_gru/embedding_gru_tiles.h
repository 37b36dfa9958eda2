// The pieces that the CUDA recurrences share: weights as fragments of tensor-core products, the
// split of float32 into bfloat16 parts, the sums over warps, the gates.
//
// A block owns kUnits hidden units for a few rows of the batch. Weights are the left operand of
// every product (16 units x 16 of the sum), the state of 8 rows the right one; warp w takes group
// w % kGroups of the units and share w / kGroups of the sum.
#pragma once

#include "common/gpu.h"
#include "embedding_gru/embedding_gru.h"

namespace fastlm {
namespace gru {

constexpr int kGates = 3;
// tiles of weights on their way to registers, per warp
constexpr int kStagedTiles = 2;
constexpr int kBatchTile = 8;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * gpu::kLanesOfWarp;
// floats of a row of partial sums: one more than its 8 rows of the batch, against bank conflicts
constexpr int kSumStride = kBatchTile + 1;

// Parts: bfloat16 numbers that make up one operand. Products of parts i and j with i + j < Parts
// are taken: 1 (bfloat16), 3 (16 bits of the operands) or 6 (24 bits, float32).
// Groups: of 16 units. Tiles: of 16 of the sum, per warp; so many of them as `Held` says are kept
// in registers, two parts of each, and the rest in shared memory.
template <int Parts, int Groups, int Tiles, int Held = Tiles>
struct Tiling {
  static constexpr int kParts = Parts, kGroups = Groups, kTiles = Tiles;
  static constexpr int kUnits = 16 * Groups;
  static constexpr int kShares = kWarps / Groups;
  static constexpr int kDepth = kShares * Tiles * 16;  // the largest hidden size
  static constexpr int kHeldParts = Parts < 2 ? Parts : 2, kHeldTiles = Held;
  // fragments of one gate that a warp keeps in shared memory, 512 bytes each
  static constexpr int kLoose = kHeldParts * (Tiles - Held) + (Parts > 2 ? Tiles : 0);
  static constexpr int kLooseBytes = kWarps * kGates * kLoose * 512;
  // 16 bytes more than a multiple of 128: the 8 rows of a matrix fall into different banks
  static constexpr int kStateStride = kDepth + 8;  // forward: one part of one row
  // backward: gates whose gradients are in shared memory at once, as many as fit
  static constexpr int kGatesAtOnce = Parts * kDepth > 2048 ? 1 : kGates;
  static constexpr int kGradStride = kGatesAtOnce * kDepth + 8;
  static constexpr int kPairs = kBatchTile * kUnits / 2;  // (row, two units) of a batch tile
  static constexpr int kMaxRowTiles = kThreads / kPairs;  // a thread owns one pair at most
  // the sums of small products apart: shorter chains, and nothing lost to the large ones
  static constexpr int kSums = Parts > 1 ? 2 : 1;
  // vectors of 16 bytes that a lane waits for at once, where registers are left
  static constexpr int kInFlight = kHeldParts * kHeldTiles <= 8 ? 6 : Parts > 1 ? 2 : 4;
  static_assert(Tiles % 2 == 0, "matrices are loaded for two tiles at a time");
};

template <int Parts>
FASTLM_DEVICE void split_pair(float x0, float x1, uint32_t (&parts)[Parts]) {
#pragma unroll
  for (int i = 0; i < Parts; ++i) {
    parts[i] = gpu::pack_bfloat16(x0, x1);
    float p0 = gpu::float_of_bits(parts[i] << 16);
    float p1 = gpu::float_of_bits(parts[i] & 0xffff0000u);
    // infinity and NaN leave nothing over; infinity less infinity would be NaN
    x0 = fabsf(p0) < INFINITY ? x0 - p0 : 0.f;
    x1 = fabsf(p1) < INFINITY ? x1 - p1 : 0.f;
  }
}

// an element of w_hh [3H, H], 0 outside
FASTLM_DEVICE float weight_at(const float* w, int64_t hidden, int g, int row, int column) {
  return row < hidden && column < hidden ? w[(g * hidden + row) * hidden + column] : 0.f;
}

template <class T, bool Backward>
struct Weights {
  uint32_t held[T::kHeldParts][kGates][T::kHeldTiles][4];
  uint32_t loose;  // shared address of [gate][kLoose][lane] of this warp, from this lane on

  FASTLM_DEVICE static int slot(int part, int g, int t) {
    const int loose_tiles = T::kTiles - T::kHeldTiles;
    const int in_gate = part < T::kHeldParts ? part * loose_tiles + t - T::kHeldTiles
                                             : T::kHeldParts * loose_tiles + t;
    return (g * T::kLoose + in_gate) * gpu::kLanesOfWarp;
  }

  // element(g, t, m, k): of row m and column k of fragment t. own, stage: of the warp, in shared
  // memory; `stage` is free again at the next barrier.
  template <class Element>
  FASTLM_DEVICE void load(const Element& element, uint4* own, uint4* stage) {
    const int lane = gpu::thread_index() % gpu::kLanesOfWarp;
    own += lane;
    stage += lane;
    loose = gpu::shared_address(own);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
#pragma unroll
      for (int first = 0; first < T::kTiles; first += kStagedTiles) {
        // a loop that stays one: the addresses of all tiles at once are more than there are
        // registers
#pragma unroll 1
        for (int j = 0; j < kStagedTiles; ++j) {
          uint32_t parts[4][T::kParts];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int m = lane / 4 + q % 2 * 8, k = lane % 4 * 2 + q / 2 * 8;
            split_pair(element(g, first + j, m, k), element(g, first + j, m, k + 1), parts[q]);
          }
#pragma unroll
          for (int i = 0; i < T::kParts; ++i) {
            stage[(j * T::kParts + i) * gpu::kLanesOfWarp] =
                uint4{parts[0][i], parts[1][i], parts[2][i], parts[3][i]};
          }
        }
        take_tiles(g, first, own, gpu::shared_address(stage));
      }
    }
  }

  FASTLM_DEVICE void take_tiles(int g, int first, uint4* own, uint32_t stage) {
#pragma unroll
    for (int j = 0; j < kStagedTiles; ++j) {
#pragma unroll
      for (int i = 0; i < T::kParts; ++i) {
        uint32_t v[4];
        gpu::load_shared(stage + (j * T::kParts + i) * gpu::kLanesOfWarp * 16, v);
        if (i < T::kHeldParts && first + j < T::kHeldTiles) {
#pragma unroll
          for (int q = 0; q < 4; ++q) held[i][g][first + j][q] = v[q];
        } else {
          own[slot(i, g, first + j)] = uint4{v[0], v[1], v[2], v[3]};
        }
      }
    }
  }

  // sum += (part I of the weights of gate g, tile t) * b
  template <int I>
  FASTLM_DEVICE void multiply(float (&sum)[4], int g, int t, uint32_t b0, uint32_t b1) const {
    if (I < T::kHeldParts && t < T::kHeldTiles) {
      gpu::multiply_add(sum, held[I < T::kHeldParts ? I : 0][g][t], b0, b1);
    } else {
      uint32_t a[4];
      gpu::load_shared(loose + slot(I, g, t) * 16, a);
      gpu::multiply_add(sum, a, b0, b1);
    }
  }

  // all parts of the weights that go with part `State` of the state
  template <int State>
  FASTLM_DEVICE void multiply_parts(float (&sum)[T::kSums][4], int g, int t, uint32_t b0,
                                    uint32_t b1) const {
    multiply<0>(sum[State > 0], g, t, b0, b1);
    if constexpr (State + 1 < T::kParts) multiply<1>(sum[1], g, t, b0, b1);
    if constexpr (State + 2 < T::kParts) multiply<2>(sum[1], g, t, b0, b1);
  }
};

// the address that this lane gives to load_matrices: two tiles of the sum, 8 rows of `stride`
FASTLM_DEVICE uint32_t matrix_address(uint32_t base, int stride, int first_k) {
  const int lane = gpu::thread_index() % gpu::kLanesOfWarp;
  return base + (lane % 8 * stride + first_k + lane / 8 * 8) * 2;
}

template <class T, int State>
FASTLM_DEVICE void multiply_gates(const Weights<T, false>& weights, uint32_t address, int t,
                                  float (&sum)[kGates][T::kSums][4]) {
  uint32_t b[4];
  gpu::load_matrices(address + (State * kBatchTile * T::kStateStride + t * 16) * 2, b);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      weights.template multiply_parts<State>(sum[g], g, t + j, b[2 * j], b[2 * j + 1]);
    }
  }
}

template <int Sums>
FASTLM_DEVICE void clear(float (&sum)[Sums][4]) {
#pragma unroll
  for (int i = 0; i < Sums; ++i) {
#pragma unroll
    for (int q = 0; q < 4; ++q) sum[i][q] = 0.f;
  }
}

// Forward: the warp's share of the product of all gates with the state of 8 rows of the batch,
// [part][row][kStateStride] at `address`.
template <class T>
FASTLM_DEVICE void multiply_tile(const Weights<T, false>& weights, uint32_t address,
                                 float (&sum)[kGates][T::kSums][4]) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) clear(sum[g]);
#pragma unroll
  for (int t = 0; t < T::kTiles; t += 2) {
    multiply_gates<T, 0>(weights, address, t, sum);
    if constexpr (T::kParts > 1) multiply_gates<T, 1>(weights, address, t, sum);
    if constexpr (T::kParts > 2) multiply_gates<T, 2>(weights, address, t, sum);
  }
}

template <class T, int State>
FASTLM_DEVICE void multiply_gradient(const Weights<T, true>& weights, uint32_t address, int g,
                                     int t, float (&sum)[T::kSums][4]) {
  uint32_t b[4];
  gpu::load_matrices(address + (State * kBatchTile * T::kGradStride + t * 16) * 2, b);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    weights.template multiply_parts<State>(sum, g, t + j, b[2 * j], b[2 * j + 1]);
  }
}

// Backward: the warp's share of the product with the gradients of kGatesAtOnce gates, 8 rows of
// the batch, [part][row][gate][kDepth] at `address`; a row has kGradStride elements.
template <class T, int FirstGate>
FASTLM_DEVICE void multiply_tile(const Weights<T, true>& weights, uint32_t address,
                                 float (&total)[4]) {
  float sum[T::kGatesAtOnce][T::kSums][4];
#pragma unroll
  for (int g = 0; g < T::kGatesAtOnce; ++g) clear(sum[g]);
#pragma unroll
  for (int t = 0; t < T::kTiles; t += 2) {
#pragma unroll
    for (int g = 0; g < T::kGatesAtOnce; ++g) {
      const uint32_t at = address + g * T::kDepth * 2;
      multiply_gradient<T, 0>(weights, at, FirstGate + g, t, sum[g]);
      if constexpr (T::kParts > 1) {
        multiply_gradient<T, 1>(weights, at, FirstGate + g, t, sum[g]);
      }
      if constexpr (T::kParts > 2) {
        multiply_gradient<T, 2>(weights, at, FirstGate + g, t, sum[g]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    total[q] = 0.f;
#pragma unroll
    for (int i = T::kSums - 1; i >= 0; --i) {
#pragma unroll
      for (int g = 0; g < T::kGatesAtOnce; ++g) total[q] += sum[g][i][q];
    }
  }
}

// writes a fragment [16 units, 8 rows] to `sums` [unit][kSumStride]
FASTLM_DEVICE void store_fragment(float* sums, const float (&value)[4]) {
  const int lane = gpu::thread_index() % gpu::kLanesOfWarp;
  float* p = sums + lane / 4 * kSumStride + lane % 4 * 2;
  p[0] = value[0];
  p[1] = value[1];
  p[8 * kSumStride] = value[2];
  p[8 * kSumStride + 1] = value[3];
}

FASTLM_DEVICE float sigmoid(float x) { return gpu::quotient(1.f, 1.f + gpu::exponential(-x)); }
FASTLM_DEVICE float tanh(float x) {
  return 1.f - gpu::quotient(2.f, gpu::exponential(2.f * x) + 1.f);
}

struct Gates {
  float r, z, n, a;
};

// one step of one unit: x the input projection, s the product with the state, b the bias
FASTLM_DEVICE Gates gates_of(const float (&x)[kGates], const float (&s)[kGates]) {
  Gates g;
  g.r = sigmoid(x[0] + s[0]);
  g.z = sigmoid(x[1] + s[1]);
  g.a = s[2];
  g.n = tanh(x[2] + g.r * g.a);
  return g;
}

struct GateGradients {
  float dr, dz, dn, dnr;
};

FASTLM_DEVICE GateGradients gradients_of(const Gates& g, float h, float d) {
  GateGradients out;
  out.dn = d * (1.f - g.z) * (1.f - g.n * g.n);
  out.dz = d * (h - g.n) * g.z * (1.f - g.z);
  out.dr = out.dn * g.a * g.r * (1.f - g.r);
  out.dnr = out.dn * g.r;
  return out;
}

// `count` (0, 1 or 2) values; the rest is 0
FASTLM_DEVICE void load_pair(const float* p, int count, float (&v)[2]) {
  v[0] = count > 0 ? p[0] : 0.f;
  v[1] = count > 1 ? p[1] : 0.f;
}
FASTLM_DEVICE void store_pair(float* p, int count, float v0, float v1) {
  if (count > 0) p[0] = v0;
  if (count > 1) p[1] = v1;
}

}  // namespace gru
}  // namespace fastlm
