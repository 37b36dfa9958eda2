// The recurrence of a GRU layer, forward and backward, on the CPU. Torch-free.
//
//   r = sigmoid(x_r + W_hr h + b_hr)      z = sigmoid(x_z + W_hz h + b_hz)
//   a = W_hn h + b_hn                     n = tanh(x_n + r a)          h' = n + z (h - n)
//
// x_* is a row of `table`, the input projection W_i* x + b_i*: one row for each token, or one for
// each distinct token, which `index` then chooses. Gate order r, z, n as in torch.nn.GRU.
//
// Token (b, t) stands at n = b * batch_stride + t * step_stride in every per-token array, or where
// `rows` and `offsets` say, so one kernel serves batch-first, time-first and packed layouts. All
// arrays are contiguous, and of float32 where nothing else is said.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/threads.h"

namespace fastlm {

// extra floats per row of the workspace: rows of equal power-of-two stride would fall into the same
// cache sets
constexpr int64_t kSkew = 16;

struct GruShape {
  int64_t batch, steps, hidden;
  int64_t batch_stride, step_stride;
  bool reverse;  // from the last step to the first
  // sequences of different lengths, longest first, or all null. Token (b, t) then stands at
  // rows[b] + offsets[t], step t works on the first counts[t] sequences, and the reverse direction
  // starts each sequence at its own last token
  const int64_t* rows;     // [B]
  const int64_t* lengths;  // [B], falling, 0 allowed
  const int64_t* offsets;  // [T]
  const int64_t* counts;   // [T], falling
};

struct GruForward {
  GruShape shape;
  const float* table;    // [rows, 3H]
  const int64_t* index;  // [N] row of each token, or null: token n has row n
  const uint8_t* reset;  // [N] or null: 1 starts this token from a zero state
  const void* w_hh;      // [3H, H] of float, or of bfloat16
  const float* b_hh;     // [3H] or null
  const float* h0;       // [B, H] or null: zeros
  float* out;            // [N, H]
  float* h_n;            // [B, H]
  float* gates;          // [N, 4H]: r, z, n, a; or null when no backward follows
  bool bfloat16;         // w_hh is
  bool round;            // operands of the recurrent product rounded to bfloat16
  float* workspace;      // gru_forward_workspace floats, 64-byte aligned
};

struct GruBackward {
  GruShape shape;
  const int64_t* index;  // as in the forward
  const uint8_t* reset;  // as in the forward
  const void* w_hh;      // [3H, H] of float, or of bfloat16
  const float* h0;       // [B, H] or null
  const float* out;      // [N, H]
  const float* gates;    // [N, 4H]
  const float* dout;     // [N, H] or null
  const float* dh_n;     // [B, H] or null
  float* dhidden_gates;  // [N, 3H]: dr, dz, dn * r, gradients of the pre-activations
  float* dtable;         // [rows, 3H], with `index` zeroed by the caller: dr, dz, dn
  float* dh0;            // [B, H]
  float* dbias;          // [2, 3H]: of b_ih, of b_hh
  bool bfloat16, round;  // as in the forward
  float* workspace;      // gru_backward_workspace floats, 64-byte aligned
};

int64_t gru_forward_workspace(const GruShape& shape);
int64_t gru_backward_workspace(const GruShape& shape);
// how many threads are worth their barriers
int gru_threads(const GruShape& shape, int available);

FASTLM_PER_ISA_BF16(void, gru_forward, (const GruForward& args, Team& team, int rank))
FASTLM_PER_ISA_BF16(void, gru_backward, (const GruBackward& args, Team& team, int rank))

}  // namespace fastlm
