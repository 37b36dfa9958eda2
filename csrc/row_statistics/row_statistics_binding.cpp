#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/binding.h"
#include "row_statistics/row_statistics.h"

namespace fastlm {
namespace {

using OptionalTensor = std::optional<Tensor>;

// a task should be worth waking a thread for
constexpr int64_t kElementsPerTask = 1 << 15;

int64_t grain(int64_t classes) {
  return classes > 0 && classes < kElementsPerTask ? kElementsPerTask / classes : 1;
}

// A fresh dlogits is the largest tensor of a training step, and the first touch of its pages costs
// more than the arithmetic. Above this size malloc gives every block a mapping of its own, so the
// advice touches nothing else.
constexpr int64_t kOwnMappingBytes = int64_t(32) << 20;
constexpr int64_t kHugePageBytes = int64_t(2) << 20;

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < kOwnMappingBytes) return;
  int64_t begin = (int64_t(data) + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  int64_t end = (int64_t(data) + bytes) / kHugePageBytes * kHugePageBytes;
  madvise(reinterpret_cast<void*>(begin), size_t(end - begin), MADV_HUGEPAGE);  // only a hint
#endif
}

const float* floats(const OptionalTensor& t) { return static_cast<const float*>(in(t)); }
const int64_t* indices(const OptionalTensor& t) { return static_cast<const int64_t*>(in(t)); }
float* results(const OptionalTensor& t) { return static_cast<float*>(out(t)); }

// weights of each class [V], or of each logit [N, V]
int64_t weight_stride(const OptionalTensor& weight) {
  return weight && weight->dim() == 2 ? weight->stride(0) : 0;
}

void forward(const Tensor& logits, const OptionalTensor& target, const OptionalTensor& weight,
             int64_t ignore_index, double scale, double softcap, const OptionalTensor& max,
             const OptionalTensor& log_sum, const OptionalTensor& lse,
             const OptionalTensor& logprob, const OptionalTensor& entropy,
             const OptionalTensor& sum_sq, const OptionalTensor& weighted_sum,
             const OptionalTensor& weight_mass, const OptionalTensor& argmax) {
  RowForward args{};
  args.logits = in(logits);
  args.row_stride = logits.stride(0);
  args.class_stride = logits.stride(1);
  args.classes = logits.size(1);
  args.target = indices(target);
  args.ignore_index = ignore_index;
  args.scale = float(scale);
  args.softcap = float(softcap);
  args.weighted = bool(weighted_sum);
  args.weight = floats(weight);
  args.weight_stride = weight_stride(weight);
  args.max = results(max);
  args.log_sum = results(log_sum);
  args.lse = results(lse);
  args.logprob = results(logprob);
  args.entropy = results(entropy);
  args.sum_sq = results(sum_sq);
  args.weighted_sum = results(weighted_sum);
  args.weight_mass = results(weight_mass);
  args.argmax = static_cast<int64_t*>(out(argmax));
  auto rows = FASTLM_PICK(row_statistics_forward);
  bool bfloat16 = is_bfloat16(logits);
  parallel_rows(logits.size(0), grain(args.classes),
                [&](int64_t begin, int64_t end) { rows(args, bfloat16, begin, end); });
}

void backward(const Tensor& logits, const OptionalTensor& target, const OptionalTensor& weight,
              int64_t ignore_index, double scale, double softcap, const Tensor& max,
              const Tensor& log_sum, const OptionalTensor& on_p, const OptionalTensor& on_p_log_p,
              const OptionalTensor& on_p_squared, const OptionalTensor& on_weight,
              const OptionalTensor& on_target, const Tensor& dlogits) {
  RowBackward args{};
  args.logits = in(logits);
  args.row_stride = logits.stride(0);
  args.classes = logits.size(1);
  args.target = indices(target);
  args.ignore_index = ignore_index;
  args.scale = float(scale);
  args.softcap = float(softcap);
  args.weight = floats(weight);
  args.weight_stride = weight_stride(weight);
  args.max = static_cast<const float*>(in(max));
  args.log_sum = static_cast<const float*>(in(log_sum));
  args.on_p = floats(on_p);
  args.on_p_log_p = floats(on_p_log_p);
  args.on_p_squared = floats(on_p_squared);
  args.on_weight = floats(on_weight);
  args.on_target = floats(on_target);
  args.dlogits = out(dlogits);
  auto rows = FASTLM_PICK(row_statistics_backward);
  bool bfloat16 = is_bfloat16(logits);
  if (args.dlogits != args.logits)
    advise_huge_pages(args.dlogits, logits.size(0) * args.classes * (bfloat16 ? 2 : 4));
  parallel_rows(logits.size(0), grain(args.classes),
                [&](int64_t begin, int64_t end) { rows(args, bfloat16, begin, end); });
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "row_statistics_forward(Tensor logits, Tensor? target, Tensor? weight, int ignore_index, "
      "float scale, float softcap, Tensor(a!)? max, Tensor(b!)? log_sum, Tensor(c!)? lse, "
      "Tensor(d!)? logprob, Tensor(e!)? entropy, Tensor(f!)? sum_sq, Tensor(g!)? weighted_sum, "
      "Tensor(h!)? weight_mass, Tensor(i!)? argmax) -> ()");
  // dlogits may be logits
  m.def(
      "row_statistics_backward(Tensor logits, Tensor? target, Tensor? weight, int ignore_index, "
      "float scale, float softcap, Tensor max, Tensor log_sum, Tensor? on_p, Tensor? on_p_log_p, "
      "Tensor? on_p_squared, Tensor? on_weight, Tensor? on_target, Tensor(a!) dlogits) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("row_statistics_forward", TORCH_BOX(&fastlm::forward));
  m.impl("row_statistics_backward", TORCH_BOX(&fastlm::backward));
}
