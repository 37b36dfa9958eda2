// The launchers of csrc/embedding_gru for ctypes; argument order of the torch ops.
#include "embedding_gru/embedding_gru_cuda.h"

using namespace fastlm;

extern "C" {
int emulated_gru_forward(const float* table, int64_t rows, const int64_t* index,
                         const uint8_t* reset, const float* w_hh, const float* b_hh,
                         const float* h0, int parts, bool clusters, bool reverse, int64_t batch,
                         int64_t steps, int64_t hidden, int64_t batch_stride, int64_t step_stride,
                         void* exchange, float* h_n, float* gates) {
  GruCudaForward args{{batch, steps, hidden, batch_stride, step_stride, reverse},
                      table,
                      rows,
                      index,
                      reset,
                      w_hh,
                      b_hh,
                      h0,
                      exchange,
                      h_n,
                      gates};
  return (clusters ? gru_forward_cluster : gru_forward_cuda)(args, parts, nullptr);
}

int emulated_gru_backward(const float* dout, const float* dh_n, const uint8_t* reset,
                          const float* w_hh, const float* h0, const float* out, const float* gates,
                          int parts, bool clusters, bool reverse, int64_t batch, int64_t steps,
                          int64_t hidden, int64_t batch_stride, int64_t step_stride, void* exchange,
                          float* dinput, float* dhidden_gates, float* dh0) {
  GruCudaBackward args{{batch, steps, hidden, batch_stride, step_stride, reverse},
                       reset,
                       w_hh,
                       h0,
                       out,
                       gates,
                       dout,
                       dh_n,
                       exchange,
                       dinput,
                       dhidden_gates,
                       dh0};
  return (clusters ? gru_backward_cluster : gru_backward_cuda)(args, parts, nullptr);
}

int64_t emulated_gru_rows(int64_t hidden, int parts, bool clusters, bool backward) {
  if (clusters)
    return (backward ? gru::backward_cluster_fit : gru::forward_cluster_fit)(hidden, parts).rows;
  return (backward ? gru::backward_fit : gru::forward_fit)(hidden, parts).rows;
}
}
