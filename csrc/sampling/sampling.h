#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastlm {

constexpr int64_t kSampleBlock = 256;  // classes per partial sum
constexpr int64_t kSampleLanes = 16;   // the most lanes a vector can have

struct SampleOptions {
  double temperature;  // 0: the most likely token
  int64_t top_k;       // 0: off
  double top_p;        // 1: off
  double min_p;        // 0: off
};

struct SampleArgs {
  const void* logits;      // [rows, classes], float or bfloat16, rows `stride` apart
  const int64_t* row_ids;  // [rows], or null: 0, 1, 2, ...
  const int64_t* seeds;    // [rows], or null: seed
  const int64_t* steps;    // [rows], or null: step
  int64_t* tokens;         // [rows]; -1 where the row is no distribution
  float* logprobs;         // [rows]; NaN there
  int64_t classes, stride, seed, step;
  SampleOptions options;
};

// floats of scratch that one thread needs: block sums (double), group maxima, and two copies of
// the row for the selection of a threshold
static inline int64_t sample_scratch(int64_t classes) {
  int64_t blocks = (classes + kSampleBlock - 1) / kSampleBlock;
  return blocks * (2 + kSampleLanes) + 2 * (blocks * kSampleBlock);
}

FASTLM_PER_ISA(void, sample_rows,
               (const SampleArgs& args, bool bfloat16, int64_t begin, int64_t end, float* scratch))

}  // namespace fastlm
