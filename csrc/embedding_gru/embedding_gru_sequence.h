// Where the tokens of a batch stand. For embedding_gru_cpu.cpp alone,
// which is compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/vec.h"
#include "embedding_gru/embedding_gru.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

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

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
