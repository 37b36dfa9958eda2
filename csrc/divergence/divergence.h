// Divergence between the softmaxes of two rows of logits, and its gradient for the first of them.
//
// q = softmax(scale * logits) is the student, p = softmax(scale * teacher):
//   forward   KL(p || q)
//   reverse   KL(q || p)
//   jsd       beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastlm {

enum class Divergence : int64_t { forward, reverse, jsd };

struct DivergenceArgs {
  float* logits;   // [rows, classes]; with a factor, their gradient afterwards
  float* teacher;  // [rows, classes]; spent
  int64_t classes;
  Divergence kind;
  double beta;
  float scale;
  const float* factor;  // of each row's gradient; null: there is none
  float* value;         // of each row
};

// rows [begin, end); one row never depends on another
FASTLM_PER_ISA(void, divergence_rows, (const DivergenceArgs& args, int64_t begin, int64_t end))

}  // namespace fastlm
