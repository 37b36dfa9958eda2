// What both CUDA recurrences do for the two units of one row that a thread computes.
#pragma once

#include "embedding_gru/embedding_gru_cuda.h"
#include "embedding_gru/embedding_gru_tiles.h"

namespace fastlm {
namespace gru {

// where this thread stands
struct Place {
  int lane, warp;
  int rank;           // of the block, among those of its slice
  int64_t first_row;  // of the slice
  int rows;           // of the slice that exist

  FASTLM_DEVICE Place(int rank, int64_t first_row, int64_t last_row, int most)
      : lane(gpu::thread_index() % gpu::kLanesOfWarp),
        warp(gpu::thread_index() / gpu::kLanesOfWarp),
        rank(rank),
        first_row(first_row),
        rows(int(last_row - first_row < most ? last_row - first_row : most)) {}
};

// the two units of one row that this thread computes, if any
struct Pair {
  int row, unit, local;  // in the slice; of all; of the block
  int count;             // units that exist: 0, 1 or 2
  bool writes;           // columns past H too, up to the width of `exchange`

  template <class T>
  FASTLM_DEVICE static Pair of(const Place& place, int64_t hidden) {
    Pair p;
    const int pairs = T::kUnits / 2;
    p.row = gpu::thread_index() / pairs;
    p.local = gpu::thread_index() % pairs * 2;
    p.unit = place.rank * T::kUnits + p.local;
    const bool there = p.row < place.rows;
    const int64_t left = there ? hidden - p.unit : 0;
    p.count = left > 2 ? 2 : left > 0 ? int(left) : 0;
    p.writes = there && p.unit < gru_exchange_width(hidden);
    return p;
  }
};

FASTLM_DEVICE int64_t token(const GruShape& s, int64_t row, int step) {
  return row * s.batch_stride + (s.reverse ? int(s.steps) - 1 - step : step) * s.step_stride;
}

// the input projection of one token
FASTLM_DEVICE void load_input(const GruCudaForward& a, const Pair& pair, int64_t row, int step,
                              float (&x)[2][kGates]) {
  const int64_t n = token(a.shape, row, step), hidden = a.shape.hidden;
  const int64_t at = a.index ? a.index[n] : n;
  const bool valid = at >= 0 && at < a.rows;
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    float v[2];
    load_pair(a.table + (valid ? at : 0) * kGates * hidden + g * hidden + pair.unit, pair.count, v);
    x[0][g] = valid ? v[0] : NAN;
    x[1][g] = valid ? v[1] : NAN;
  }
}

// the forward of a thread's pair
struct ForwardUnits {
  float h[2], bias[kGates][2], x[2][kGates];

  FASTLM_DEVICE void start(const GruCudaForward& a, const Pair& pair, int64_t row) {
    const int64_t hidden = a.shape.hidden;
    load_pair(a.h0 + row * hidden + pair.unit, a.h0 ? pair.count : 0, h);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      load_pair(a.b_hh + g * hidden + pair.unit, a.b_hh ? pair.count : 0, bias[g]);
    }
    if (pair.count > 0) load_input(a, pair, row, 0, x);
  }

  // s: the bias and the product with the state, of both units
  FASTLM_DEVICE void advance(const Pair& pair, const float (&s)[2][kGates], Gates (&gates)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      gates[i] = gates_of(x[i], s[i]);
      h[i] = gates[i].n + gates[i].z * (h[i] - gates[i].n);
    }
    if (pair.count < 2) h[1] = 0.f;
  }

  // what no other block waits for: the gates, h_n, and the next step's input
  FASTLM_DEVICE void finish(const GruCudaForward& a, const Pair& pair, int64_t row, int step,
                            const Gates (&gates)[2]) {
    const int64_t hidden = a.shape.hidden;
    if (step + 1 < int(a.shape.steps)) {
      load_input(a, pair, row, step + 1, x);
    } else {
      store_pair(a.h_n + row * hidden + pair.unit, pair.count, h[0], h[1]);
    }
    if (!a.gates) return;
    float* to = a.gates + token(a.shape, row, step) * 4 * hidden + pair.unit;
    store_pair(to, pair.count, gates[0].r, gates[1].r);
    store_pair(to + hidden, pair.count, gates[0].z, gates[1].z);
    store_pair(to + 2 * hidden, pair.count, gates[0].n, gates[1].n);
    store_pair(to + 3 * hidden, pair.count, gates[0].a, gates[1].a);
  }
};

// what one step of the backward reads, fetched while the step before waits for other blocks
struct Saved {
  float r[2], z[2], n[2], a[2], h[2], dout[2];

  FASTLM_DEVICE void load(const GruCudaBackward& args, const Pair& pair, int64_t row, int step) {
    const GruShape& s = args.shape;
    const int64_t at = token(s, row, step), hidden = s.hidden;
    const float* gates = args.gates + at * 4 * hidden + pair.unit;
    load_pair(gates, pair.count, r);
    load_pair(gates + hidden, pair.count, z);
    load_pair(gates + 2 * hidden, pair.count, n);
    load_pair(gates + 3 * hidden, pair.count, a);
    load_pair(args.dout + at * hidden + pair.unit, pair.count, dout);
    const bool starts = args.reset && pair.count > 0 && args.reset[at];
    const float* before = starts     ? nullptr
                          : step > 0 ? args.out + token(s, row, step - 1) * hidden
                          : args.h0  ? args.h0 + row * hidden
                                     : nullptr;
    load_pair(before + pair.unit, before ? pair.count : 0, h);
  }
};

// the gradients of one step's gates, 0 for units that do not exist; leaves d * z in d
FASTLM_DEVICE void step_back(const Pair& pair, const Saved& saved, float (&d)[2],
                             GateGradients (&grad)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Gates gates = {saved.r[i], saved.z[i], saved.n[i], saved.a[i]};
    d[i] += saved.dout[i];
    grad[i] = gradients_of(gates, saved.h[i], d[i]);
    d[i] *= gates.z;
    if (i >= pair.count) grad[i] = {0.f, 0.f, 0.f, 0.f};
  }
}

FASTLM_DEVICE void store_gradients(const GruCudaBackward& a, const Pair& pair, int64_t n,
                                   const GateGradients (&grad)[2]) {
  const int64_t hidden = a.shape.hidden;
  float* input = a.dinput + n * kGates * hidden + pair.unit;
  store_pair(input, pair.count, grad[0].dr, grad[1].dr);
  store_pair(input + hidden, pair.count, grad[0].dz, grad[1].dz);
  store_pair(input + 2 * hidden, pair.count, grad[0].dn, grad[1].dn);
  if (!a.dhidden_gates) return;
  float* to = a.dhidden_gates + n * kGates * hidden + pair.unit;
  store_pair(to, pair.count, grad[0].dr, grad[1].dr);
  store_pair(to + hidden, pair.count, grad[0].dz, grad[1].dz);
  store_pair(to + 2 * hidden, pair.count, grad[0].dnr, grad[1].dnr);
}

}  // namespace gru
}  // namespace fastlm
