// The recurrence on a GPU, for compute capability 8.0 and later. Torch-free; the mathematics and
// the layout of tokens are those of embedding_gru.h.
//
// One kernel runs all steps; blocks exchange each step's state through `exchange`, which is an
// output at the same time: every element is first set to the NaN whose bits are all ones, and
// readers wait for any other value. A NaN that was computed is written with other bits.
#pragma once

#include <cuda_runtime_api.h>

#include "embedding_gru/embedding_gru.h"

namespace fastlm {

// elements of a row of `exchange` for H hidden units: vectors of 16 bytes
__host__ __device__ constexpr int64_t gru_exchange_width(int64_t hidden) {
  return (hidden + 7) / 8 * 8;
}

struct GruCudaForward {
  GruShape shape;
  const float* table;    // [rows, 3H]
  int64_t rows;          // an index outside gives NaN in its sequence
  const int64_t* index;  // [N] or null
  const uint8_t* reset;  // [N] or null
  const float* w_hh;     // [3H, H]
  const float* b_hh;     // [3H] or null
  const float* h0;       // [B, H] or null
  void* exchange;        // [N, width] states: bfloat16 with one part, else float32; 0 past H
  float* h_n;            // [B, H]
  float* gates;          // [N, 4H] or null
};

struct GruCudaBackward {
  GruShape shape;
  const uint8_t* reset;  // [N] or null
  const float* w_hh;     // [3H, H]
  const float* h0;       // [B, H] or null
  const float* out;      // [N, H]
  const float* gates;    // [N, 4H]
  const float* dout;     // [N, H]
  const float* dh_n;     // [B, H]
  void* exchange;        // [N, 3, width]: dr, dz, dn * r, as `exchange` of the forward
  float* dinput;         // [N, 3H]: dr, dz, dn
  float* dhidden_gates;  // [N, 3H]: dr, dz, dn * r; or null, when `exchange` is enough
  float* dh0;            // [B, H]
};

// What the current device can hold at once.
struct GruCudaFit {
  int64_t rows;        // of the batch in one launch; 0: none
  const char* reason;  // why none, or null
};
namespace gru {
GruCudaFit forward_fit(int64_t hidden, int parts);
GruCudaFit backward_fit(int64_t hidden, int parts);
GruCudaFit forward_cluster_fit(int64_t hidden, int parts);
GruCudaFit backward_cluster_fit(int64_t hidden, int parts);
}  // namespace gru

// `parts` says how the operands of the recurrent products are rounded: 1 to bfloat16, 2 to 16 bits
// of precision, 3 to 24 bits, which is float32. Sums and the state itself are float32 in all.
//
// Fills `exchange` and launches; a batch larger than one launch holds takes several, one after
// the other. Nothing waits for the GPU. cudaErrorNotSupported when nothing fits.
cudaError_t gru_forward_cuda(const GruCudaForward& args, int parts, cudaStream_t stream);
cudaError_t gru_backward_cuda(const GruCudaBackward& args, int parts, cudaStream_t stream);

// The same for compute capability 9.0 alone, through clusters of blocks: `exchange` is only a
// result, and with one part the backward does not touch it.
cudaError_t gru_forward_cluster(const GruCudaForward& args, int parts, cudaStream_t stream);
cudaError_t gru_backward_cluster(const GruCudaBackward& args, int parts, cudaStream_t stream);

}  // namespace fastlm
