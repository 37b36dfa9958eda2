// One step of a GRU in registers: packed weights, a product, the cell. Include in *_cpu.cpp only.
//
// A panel is 3 vectors of columns of a product, for all k: the three gates of a vector of hidden
// units, or 3 neighbouring vectors of classes. Every output element is one chain of fused
// multiply-adds over k in order that starts from the bias, whatever tile it falls into, so a result
// depends neither on the number of threads nor on the batch around a row.
#pragma once

#include <cstdint>

#include "common/bfloat16.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kGates = 3;
// 24 accumulators of 32 registers with AVX-512, 12 of 16 elsewhere
constexpr int kRows = kLanes == 16 ? 8 : 4;

FASTLM_INLINE int64_t vectors(int64_t hidden) { return (hidden + kLanes - 1) / kLanes; }

struct Range {
  int64_t begin, end;
};
FASTLM_INLINE Range share(int64_t count, int rank, int members) {
  return {count * rank / members, count * (rank + 1) / members};
}

FASTLM_INLINE Vec load_columns(const float* p, int64_t column, int64_t hidden) {
  return column + kLanes <= hidden ? load(p + column)
                                   : load_first(p + column, int(hidden - column), 0.f);
}
FASTLM_INLINE void store_columns(float* p, int64_t column, int64_t hidden, Vec x) {
  if (column + kLanes <= hidden) {
    store(p + column, x);
  } else {
    store_first(p + column, x, int(hidden - column));
  }
}

// sum[i][v] += sum over k of a[i][k] * panel[k][v]; panel [depth][Width vectors]
template <int Rows, int Width>
FASTLM_INLINE void multiply(const float* a, int64_t stride, const float* panel, int64_t depth,
                            Vec (&sum)[Rows][Width]) {
  for (int64_t k = 0; k < depth; ++k, panel += Width * kLanes) {
    Vec b[Width];
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      Vec x = broadcast(a[i * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sum[i][v] += x * b[v];
    }
  }
}

// the rows of a weight matrix that are the columns of one panel: `count` from `first` on
struct PanelColumns {
  int64_t first[kGates];
  int count[kGates];
};
FASTLM_INLINE int lanes_before(int64_t end, int64_t column) {
  int64_t left = end - column;
  return left < 0 ? 0 : left < kLanes ? int(left) : kLanes;
}
// vector `v` of each gate
FASTLM_INLINE PanelColumns gate_columns(int64_t hidden, int64_t v) {
  PanelColumns c;
  for (int g = 0; g < kGates; ++g) {
    c.first[g] = g * hidden + v * kLanes;
    c.count[g] = lanes_before(hidden, v * kLanes);
  }
  return c;
}
// three vectors side by side
FASTLM_INLINE PanelColumns class_columns(int64_t classes, int64_t panel) {
  PanelColumns c;
  for (int g = 0; g < kGates; ++g) {
    c.first[g] = (panel * kGates + g) * kLanes;
    c.count[g] = lanes_before(classes, c.first[g]);
  }
  return c;
}

// floats of a panel: its bias, then [k][3][lane]
FASTLM_INLINE int64_t panel_size(int64_t depth) { return kGates * kLanes * (depth + 1); }

// w [*, depth], rounded to bfloat16 if asked for, bias [*] or null; lanes without a column are 0
FASTLM_INLINE void pack_panel(const float* w, const float* bias, int64_t depth,
                              const PanelColumns& columns, float* panel, bool round = false) {
  for (int g = 0; g < kGates; ++g) {
    const int64_t first = columns.first[g];
    const int count = columns.count[g];
    store(panel + g * kLanes, bias && count > 0 ? load_first(bias + first, count, 0.f) : Vec{});
    for (int64_t k0 = 0; k0 < depth; k0 += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        block[j] = j < count ? load_columns(w + (first + j) * depth, k0, depth) : Vec{};
        if (round) block[j] = nearest_bfloat16(block[j]);
      }
      transpose(block);
      const int64_t size = depth - k0 < kLanes ? depth - k0 : kLanes;
      for (int64_t k = 0; k < size; ++k) {
        store(panel + ((k0 + k + 1) * kGates + g) * kLanes, block[k]);
      }
    }
  }
}

// sum[i] = bias + a[i] times the panel
template <int Rows>
FASTLM_INLINE void multiply_panel(const float* a, int64_t stride, const float* panel, int64_t depth,
                                  Vec (&sum)[Rows][kGates]) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) sum[i][g] = load(panel + g * kLanes);
  }
  multiply<Rows, kGates>(a, stride, panel + kGates * kLanes, depth, sum);
}

// The next state of one vector of hidden units; `gates` [4H] receives r, z, n, a, or is null.
FASTLM_INLINE Vec gru_cell(const Vec (&x)[kGates], const Vec (&hidden_sum)[kGates], Vec h,
                           int64_t column, int64_t hidden, float* gates) {
  Vec r = sigmoid(x[0] + hidden_sum[0]);
  Vec z = sigmoid(x[1] + hidden_sum[1]);
  Vec n = tanh(x[2] + r * hidden_sum[2]);
  if (gates) {
    store_columns(gates, column, hidden, r);
    store_columns(gates + hidden, column, hidden, z);
    store_columns(gates + 2 * hidden, column, hidden, n);
    store_columns(gates + 3 * hidden, column, hidden, hidden_sum[2]);
  }
  return n + z * (h - n);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
