#include <string>

#include "common/binding.h"

#if defined(FASTLM_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "embedding_gru/embedding_gru_cuda.h"

// weak: a torch without CUDA does not have it, and the library loads there all the same
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastlm {
namespace {

#if defined(FASTLM_CUDA)

bool has_cuda_kernels() { return aoti_torch_get_current_cuda_stream != nullptr; }

// why the current device cannot run a layer, with or without clusters, or ""
std::string gru_cuda_objection(int64_t hidden, int64_t parts, bool clusters) {
  const int p = int(parts);
  GruCudaFit fit = clusters ? gru::forward_cluster_fit(hidden, p) : gru::forward_fit(hidden, p);
  if (!fit.reason) {
    fit = clusters ? gru::backward_cluster_fit(hidden, p) : gru::backward_fit(hidden, p);
  }
  return fit.reason ? fit.reason : "";
}

GruShape shape_of(int64_t batch, int64_t tokens, int64_t hidden, bool batch_first, bool reverse) {
  int64_t steps = tokens / batch;
  return batch_first ? GruShape{batch, steps, hidden, steps, 1, reverse}
                     : GruShape{batch, steps, hidden, 1, batch, reverse};
}

// launches on the current stream of the tensors' device
template <typename Launch>
void on_stream_of(const Tensor& tensor, const Launch& launch) {
  torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  cudaError_t error = launch(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error == cudaSuccess, "fastlm_C.gru: CUDA error ", cudaGetErrorString(error));
}

// sizes come from h_n [B, H] and exchange [N, width]
void gru_forward_cuda_(const Tensor& table, const std::optional<Tensor>& index,
                       const std::optional<Tensor>& reset, const Tensor& w_hh,
                       const std::optional<Tensor>& b_hh, const std::optional<Tensor>& h0,
                       int64_t parts, bool clusters, bool batch_first, bool reverse,
                       const Tensor& exchange, const Tensor& h_n,
                       const std::optional<Tensor>& gates) {
  GruCudaForward args{};
  args.shape = shape_of(h_n.size(0), exchange.size(0), h_n.size(1), batch_first, reverse);
  args.table = floats(table);
  args.rows = table.size(0);
  args.index = static_cast<const int64_t*>(in(index));
  args.reset = static_cast<const uint8_t*>(in(reset));
  args.w_hh = floats(w_hh);
  args.b_hh = floats(b_hh);
  args.h0 = floats(h0);
  args.exchange = out(exchange);
  args.h_n = floats_out(h_n);
  args.gates = gates ? floats_out(*gates) : nullptr;
  on_stream_of(h_n,
               [&](cudaStream_t stream) { return gru_forward_cuda(args, int(parts), stream); });
}

void gru_backward_cuda_(const Tensor& doutput, const Tensor& dh_n,
                        const std::optional<Tensor>& reset, const Tensor& w_hh,
                        const std::optional<Tensor>& h0, const Tensor& output, const Tensor& gates,
                        int64_t parts, bool clusters, bool batch_first, bool reverse,
                        const Tensor& exchange, const Tensor& dinput,
                        const std::optional<Tensor>& dhidden_gates, const Tensor& dh0) {
  GruCudaBackward args{};
  args.shape = shape_of(dh_n.size(0), output.size(0), dh_n.size(1), batch_first, reverse);
  args.reset = static_cast<const uint8_t*>(in(reset));
  args.w_hh = floats(w_hh);
  args.h0 = floats(h0);
  args.out = floats(output);
  args.gates = floats(gates);
  args.dout = floats(doutput);
  args.dh_n = floats(dh_n);
  args.exchange = out(exchange);
  args.dinput = floats_out(dinput);
  args.dhidden_gates = dhidden_gates ? floats_out(*dhidden_gates) : nullptr;
  args.dh0 = floats_out(dh0);
  on_stream_of(dh_n,
               [&](cudaStream_t stream) { return gru_backward_cuda(args, int(parts), stream); });
}

#else

bool has_cuda_kernels() { return false; }
std::string gru_cuda_objection(int64_t, int64_t, bool) { return "built without CUDA kernels"; }

#endif

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def("has_cuda_kernels() -> bool");
  m.def("gru_cuda_objection(int hidden, int parts, bool clusters) -> str");
  m.def(
      "gru_forward_cuda(Tensor table, Tensor? index, Tensor? reset, Tensor w_hh, Tensor? b_hh, "
      "Tensor? h0, int parts, bool clusters, bool batch_first, bool reverse, Tensor(a!) exchange, "
      "Tensor(b!) h_n, Tensor(c!)? gates) -> ()");
  m.def(
      "gru_backward_cuda(Tensor doutput, Tensor dh_n, Tensor? reset, Tensor w_hh, Tensor? h0, "
      "Tensor output, Tensor gates, int parts, bool clusters, bool batch_first, bool reverse, "
      "Tensor(a!) exchange, Tensor(b!) dinput, Tensor(c!)? dhidden_gates, Tensor(d!) dh0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CompositeExplicitAutograd, m) {
  m.impl("has_cuda_kernels", TORCH_BOX(&fastlm::has_cuda_kernels));
  m.impl("gru_cuda_objection", TORCH_BOX(&fastlm::gru_cuda_objection));
}
#if defined(FASTLM_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CUDA, m) {
  m.impl("gru_forward_cuda", TORCH_BOX(&fastlm::gru_forward_cuda_));
  m.impl("gru_backward_cuda", TORCH_BOX(&fastlm::gru_backward_cuda_));
}
#endif
