// The launchers of csrc/embedding_gru for ctypes; argument order of the torch ops.
#include "embedding_gru/embedding_gru_cuda.h"

using namespace fastlm;

namespace {

GruShape shape_of(int64_t batch, int64_t steps, int64_t hidden, bool batch_first, bool reverse) {
  return batch_first ? GruShape{batch, steps, hidden, steps, 1, reverse}
                     : GruShape{batch, steps, hidden, 1, batch, reverse};
}

}  // namespace

extern "C" {
int emulated_gru_forward(const float* table, int64_t rows, const int64_t* index,
                         const uint8_t* reset, const float* w_hh, const float* b_hh,
                         const float* h0, int parts, bool clusters, bool batch_first, bool reverse,
                         int64_t batch, int64_t steps, int64_t hidden, void* exchange, float* h_n,
                         float* gates) {
  GruCudaForward args{shape_of(batch, steps, hidden, batch_first, reverse),
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
                          int parts, bool clusters, bool batch_first, bool reverse, int64_t batch,
                          int64_t steps, int64_t hidden, void* exchange, float* dinput,
                          float* dhidden_gates, float* dh0) {
  GruCudaBackward args{shape_of(batch, steps, hidden, batch_first, reverse),
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
