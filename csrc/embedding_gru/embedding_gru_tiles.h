// What both passes of the CPU kernel read and multiply with. For embedding_gru_cpu.cpp alone, which
// is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/vec.h"
#include "embedding_gru/embedding_gru.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

FASTLM_INLINE int64_t vectors(int64_t hidden) { return (hidden + kLanes - 1) / kLanes; }

struct Range {
  int64_t begin, end;
};
FASTLM_INLINE Range share(int64_t count, int rank, int members) {
  return {count * rank / members, count * (rank + 1) / members};
}

FASTLM_INLINE int64_t token(const GruShape& s, int64_t b, int64_t t) {
  return s.rows ? s.rows[b] + s.offsets[t] : b * s.batch_stride + t * s.step_stride;
}
// sequences at work in step t
FASTLM_INLINE int64_t active(const GruShape& s, int64_t t) {
  return s.counts ? s.counts[t] : s.batch;
}
FASTLM_INLINE int64_t length(const GruShape& s, int64_t b) {
  return s.lengths ? s.lengths[b] : s.steps;
}
// the first and last step of a sequence in the direction of the recurrence
FASTLM_INLINE int64_t first_step(const GruShape& s, int64_t b) {
  return s.reverse ? length(s, b) - 1 : 0;
}
FASTLM_INLINE int64_t last_step(const GruShape& s, int64_t b) {
  return s.reverse ? 0 : length(s, b) - 1;
}

// the nearest bfloat16; a NaN stays a NaN
FASTLM_INLINE Vec rounded(Vec x) {
  VecBits u = (VecBits)x;
  Vec near = (Vec)((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
  return x != x ? x : near;
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

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
