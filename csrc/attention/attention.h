// Softmax attention on the CPU, forward and backward; the mathematics stands in
// fastlm/ops/attention/reference.py.
//
// Work is cut at each sequence's own first row and key, and a sum runs in an order that depends on
// the sequence alone: so neither the number of threads nor what stands beside a sequence (in a
// batch or a packing) changes its result.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastlm {

// sizes and strides in elements everywhere

enum class Type { float32, bfloat16, float16 };

constexpr int64_t kKeyTile = 128;

// [B, S, H, n], the last dimension contiguous
struct Heads {
  void* data;
  int64_t batch, row, head;
};

// one sequence of a packing, or one batch row; its keys count from first_key
struct Sequence {
  int64_t batch, first_row, rows, first_key, keys;
  bool attends;  // false: what lies behind the last sequence of a packing
};

struct Attention {
  int64_t rows, keys, heads, key_heads, size, value_size;  // rows, keys: of the whole tensors
  Heads q, k, v;
  Type type;
  bool pairs;  // products of bfloat16 pairs, for a processor that `multiplies_pairs`
  float scale, softcap;
  int64_t left, right;     // limits of the band, or a negative number
  const int32_t *lo, *hi;  // keys [lo, hi) of each row, or null
  int64_t limits_batch, limits_head, limits_row;
  const float* slopes;  // [B or 1, H], or null
  int64_t slopes_batch;
  const float* sink;  // [H], or null
  const void* bias;   // or null; stride 0 where it is broadcast
  Type bias_type;
  int64_t bias_batch, bias_head, bias_row, bias_key;
  double dropout;
  uint64_t seed;

  int64_t group() const { return heads / key_heads; }
  bool has_extras() const { return softcap > 0 || slopes || bias || dropout > 0; }
};

struct AttentionForward {
  Attention shared;
  void* out;   // [B, Sq, H, Dv], contiguous
  float* lse;  // [B, H, Sq], contiguous
};

// rows [begin, end) of one sequence and key head, a row being a query of one head of the group
struct ForwardTask {
  Sequence sequence;
  int64_t key_head, begin, end;
};

struct AttentionBackward {
  Attention shared;
  Heads dout, out;
  const float* lse;
  const float* dlse;   // [B, H, Sq], contiguous, or null
  void *dq, *dk, *dv;  // [B, S, H, n], contiguous
  bool wants_slopes;
  float* dbias;  // with the strides below, or null
  int64_t dbias_batch, dbias_head, dbias_row, dbias_key;
};

// key tiles [begin, end) of one sequence and key head, for heads [first_head, last_head)
struct BackwardTask {
  Sequence sequence;
  int64_t key_head, first_head, last_head, begin, end;
  // float32 sums in panels, for the others to be added to; null: the task has the whole
  float *dq, *dk, *dv;
  // [last_head - first_head] each, or null
  double *dslopes, *dsink;
};

// The gradient of a bias from rows [row_begin, row_end) of each of the sequences and of each head
// in [first_head, last_head); no other task adds to the same elements.
struct BiasTask {
  const Sequence *first, *last;
  int64_t first_head, last_head, row_begin, row_end;
};

// rows of `to` = factor * the sum of `parts` matrices in panels, in order
struct PartialSums {
  const float* first;
  int64_t parts, part_stride;
  int64_t rows, size;
  float factor;
  void* to;
  int64_t row_stride;
  Type type;
};

FASTLM_PER_ISA(bool, multiplies_pairs, ())
// a task of a forward starts at a multiple of these
FASTLM_PER_ISA(int64_t, attention_block_rows, ())
FASTLM_PER_ISA(int64_t, attention_forward_workspace, (const Attention& a, int64_t rows))
FASTLM_PER_ISA(void, attention_forward,
               (const AttentionForward& a, const ForwardTask& task, float* workspace))

FASTLM_PER_ISA(int64_t, attention_panels, (int64_t rows, int64_t size))  // floats of one sum
FASTLM_PER_ISA(int64_t, attention_backward_workspace,
               (const Attention& a, int64_t rows, int64_t keys))
FASTLM_PER_ISA(void, attention_backward,
               (const AttentionBackward& a, const BackwardTask& task, float* workspace))
FASTLM_PER_ISA(void, attention_bias,
               (const AttentionBackward& a, const BiasTask& task, float* workspace))
FASTLM_PER_ISA(void, attention_sum, (const PartialSums& sums, int64_t begin, int64_t end))

}  // namespace fastlm
