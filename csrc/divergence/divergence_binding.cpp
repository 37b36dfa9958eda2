#include "common/binding.h"
#include "divergence/divergence.h"

namespace fastlm {
namespace {

// a task should be worth waking a thread for
constexpr int64_t kElementsPerTask = 1 << 14;

void divergence(const Tensor& logits, const Tensor& teacher, const std::optional<Tensor>& factor,
                int64_t kind, double beta, double scale, const Tensor& value) {
  DivergenceArgs args{};
  args.logits = floats_out(logits);
  args.teacher = floats_out(teacher);
  args.classes = logits.size(1);
  args.kind = Divergence(kind);
  args.beta = beta;
  args.scale = float(scale);
  args.factor = floats(factor);
  args.value = floats_out(value);
  auto rows = FASTLM_PICK(divergence_rows);
  parallel_rows(logits.size(0), 1 + kElementsPerTask / args.classes,
                [&](int64_t begin, int64_t end) { rows(args, begin, end); });
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  // contiguous float32; `kind` counts the enum Divergence
  m.def(
      "divergence(Tensor(a!) logits, Tensor(b!) teacher, Tensor? factor, int kind, float beta, "
      "float scale, Tensor(c!) value) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("divergence", TORCH_BOX(&fastlm::divergence));
}
