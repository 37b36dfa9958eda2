// c = a b, or c + a b, of float32 or bfloat16 matrices with any strides, summed in float32.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/threads.h"

namespace fastlm {

struct Matrix {
  const void* data;
  int64_t row, column;  // strides
  bool bfloat16;
};

struct MatmulArgs {
  Matrix a;           // [rows, depth]
  Matrix b;           // [depth, columns]
  const float* bias;  // [columns], or null; not with `accumulate`
  float* c;           // [rows, columns], unit column stride
  int64_t c_row;
  int64_t rows, columns, depth;
  bool accumulate;
  bool round;  // float32 operands to the nearest bfloat16
};

// floats of workspace, aligned to 64 bytes, that each member of the team needs
FASTLM_PER_ISA_BF16(int64_t, matmul_workspace, ())

// what member `rank` of `members` does; no member waits for another
FASTLM_PER_ISA_BF16(void, matmul, (const MatmulArgs& args, int rank, int members, float* workspace))

}  // namespace fastlm
