// Recurrent products with weights packed as words of two bfloat16, see common/bfloat16.h: half the
// bytes of float32. The order of the sum is that of embedding_gru_step.h. Include in *_cpu.cpp
// only.
#pragma once

#include "common/bfloat16.h"
#include "embedding_gru/embedding_gru_step.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// what a product multiplies: floats; weights in words, widened, and floats; words and words
enum class Operands { floats, widened, words };
#if defined(__AVX512BF16__)
constexpr Operands kRounded = Operands::words;
#else
constexpr Operands kRounded = Operands::widened;
#endif

FASTLM_INLINE int64_t words_of(int64_t depth) { return (depth + 1) / 2; }
// floats of a panel, its bias included
template <Operands K>
FASTLM_INLINE int64_t panel_size_of(int64_t depth) {
  return panel_size(K == Operands::floats ? depth : words_of(depth));
}

FASTLM_INLINE Vec load_columns(const BFloat16* p, int64_t column, int64_t hidden) {
  return column + kLanes <= hidden ? load(p + column)
                                   : load_first(p + column, int(hidden - column), 0.f);
}
FASTLM_INLINE void store_columns(BFloat16* p, int64_t column, int64_t hidden, Vec x) {
  if (column + kLanes <= hidden) {
    store(p + column, x);
  } else {
    store_first(p + column, x, int(hidden - column));
  }
}

// w [*, depth], bias [*] or null; lanes without a column are 0
FASTLM_INLINE void pack_panel_words(const BFloat16* w, const float* bias, int64_t depth,
                                    const PanelColumns& columns, float* panel) {
  const int64_t all = words_of(depth);
  for (int g = 0; g < kGates; ++g) {
    const int64_t first = columns.first[g];
    const int count = columns.count[g];
    store(panel + g * kLanes, bias && count > 0 ? load_first(bias + first, count, 0.f) : Vec{});
    float* to = panel + (kGates + g) * kLanes;
    int64_t k = 0;
    for (; 2 * (k + kLanes) <= depth; k += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j)
        block[j] = j < count ? load_words(w + (first + j) * depth + 2 * k) : Vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (k + j) * kGates * kLanes, block[j]);
    }
    for (; k < all; ++k) {
      store(to + k * kGates * kLanes, Vec{});
      for (int j = 0; j < count; ++j) {
        const BFloat16* from = w + (first + j) * depth + 2 * k;
        store_word(to + k * kGates * kLanes + j, from[0].bits,
                   2 * k + 1 < depth ? from[1].bits : uint16_t(0));
      }
    }
  }
}

// sum[i][v] += sum over k < depth of a[i][k] * panel[k][v]
template <int Rows, int Width>
FASTLM_INLINE void multiply_widened(const float* a, int64_t stride, const float* panel,
                                    int64_t depth, Vec (&sum)[Rows][Width]) {
  for (int64_t k = 0; k + 2 <= depth; k += 2, panel += Width * kLanes) {
    Vec b[Width];
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) b[v] = low_of(load(panel + v * kLanes));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      Vec x = broadcast(a[i * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sum[i][v] += x * b[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) b[v] = high_of(load(panel + v * kLanes));
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      Vec x = broadcast(a[i * stride + k + 1]);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sum[i][v] += x * b[v];
    }
  }
  if (depth % 2) {
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v)
        sum[i][v] += broadcast(a[i * stride + depth - 1]) * low_of(load(panel + v * kLanes));
    }
  }
}

#if defined(__AVX512BF16__)
// the same of words; `a` [Rows][stride] holds them too
template <int Rows, int Width>
FASTLM_INLINE void multiply_words(const float* a, int64_t stride, const float* panel, int64_t count,
                                  Vec (&sum)[Rows][Width]) {
  for (int64_t k = 0; k < count; ++k, panel += Width * kLanes) {
    Vec b[Width];
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) b[v] = load(panel + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      Vec x = broadcast_word(a + i * stride + k);
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) sum[i][v] = dot(sum[i][v], x, b[v]);
    }
  }
}
#endif

template <Operands K, int Rows, int Width>
FASTLM_INLINE void multiply_of(const float* a, int64_t stride, const float* panel, int64_t depth,
                               Vec (&sum)[Rows][Width]) {
  if constexpr (K == Operands::floats) {
    multiply<Rows, Width>(a, stride, panel, depth, sum);
  } else if constexpr (K == Operands::widened) {
    multiply_widened<Rows, Width>(a, stride, panel, depth, sum);
  } else {
#if defined(__AVX512BF16__)
    multiply_words<Rows, Width>(a, stride, panel, words_of(depth), sum);
#endif
  }
}

// sum[i] = bias + a[i] times the panel
template <Operands K, int Rows>
FASTLM_INLINE void multiply_panel_of(const float* a, int64_t stride, const float* panel,
                                     int64_t depth, Vec (&sum)[Rows][kGates]) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) sum[i][g] = load(panel + g * kLanes);
  }
  multiply_of<K, Rows, kGates>(a, stride, panel + kGates * kLanes, depth, sum);
}

// a state or gradient as an operand: rounded to words, or as it is
template <Operands K>
FASTLM_INLINE void store_operand(float* p, int64_t column, int64_t hidden, bool round, Vec x) {
  if constexpr (K == Operands::words) {
    store_columns(reinterpret_cast<BFloat16*>(p), column, hidden, x);
  } else {
    store_columns(p, column, hidden, round ? nearest_bfloat16(x) : x);
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
