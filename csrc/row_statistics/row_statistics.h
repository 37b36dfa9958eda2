// Softmax statistics of each row of logits, and the gradient of any function of them.
//
// z = scale * softcap(logits), softcap(x) = softcap * tanh(x / softcap), p = softmax(z) of the row.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastlm {

// sizes and strides in elements; every output is one number per row, and may be null
struct RowForward {
  const void* logits;
  int64_t row_stride, class_stride;
  int64_t classes;
  const int64_t* target;  // null: logprob is not computed, no row is ignored
  int64_t ignore_index;
  float scale;
  float softcap;  // 0: none
  bool weighted;
  const float* weight;  // of each class (weight_stride 0) or each logit; null: 1
  int64_t weight_stride;
  float* max;           // of z
  float* log_sum;       // log sum exp(z - max)
  float* lse;           // max + log_sum
  float* logprob;       // log p[target]
  float* entropy;       // -sum p log p
  float* sum_sq;        // sum p^2
  float* weighted_sum;  // sum weight * log p
  float* weight_mass;   // sum weight
  int64_t* argmax;      // of the logits, the first of equals
};

// dz = p * (on_p + on_p_log_p * log p + on_p_squared * p) + on_weight * weight, and on_target more
// at the target; a null coefficient is 0 in every row. dlogits may be logits itself.
struct RowBackward {
  const void* logits;
  int64_t row_stride;
  int64_t classes;
  const int64_t* target;
  int64_t ignore_index;
  float scale, softcap;
  const float* weight;
  int64_t weight_stride;
  const float *max, *log_sum;
  const float *on_p, *on_p_log_p, *on_p_squared, *on_weight, *on_target;
  void* dlogits;  // [rows, classes], contiguous
};

// rows [begin, end); one row never depends on another
FASTLM_PER_ISA(void, row_statistics_forward,
               (const RowForward& args, bool bfloat16, int64_t begin, int64_t end))
FASTLM_PER_ISA(void, row_statistics_backward,
               (const RowBackward& args, bool bfloat16, int64_t begin, int64_t end))

}  // namespace fastlm
