#include <memory>

#include "common/binding.h"
#include "sampling/sampling.h"

namespace fastlm {
namespace {

const int64_t* ids(const std::optional<Tensor>& t) { return static_cast<const int64_t*>(in(t)); }

// returns the first row that is no distribution, or -1
int64_t sample(const Tensor& logits, const std::optional<Tensor>& rows,
               const std::optional<Tensor>& seeds, const std::optional<Tensor>& steps, int64_t seed,
               int64_t step, double temperature, int64_t top_k, double top_p, double min_p,
               const Tensor& tokens, const Tensor& logprobs) {
  int64_t count = logits.size(0), classes = logits.size(1);
  SampleArgs args{in(logits),
                  ids(rows),
                  ids(seeds),
                  ids(steps),
                  static_cast<int64_t*>(out(tokens)),
                  static_cast<float*>(out(logprobs)),
                  classes,
                  logits.stride(0),
                  seed,
                  step,
                  {temperature, top_k, top_p, min_p}};
  bool bfloat16 = is_bfloat16(logits);
  auto run = FASTLM_PICK(sample_rows);
  // below 16k logits a second thread costs more than it saves
  int64_t grain = 1 + (1 << 14) / classes;
  parallel_rows(count, grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[sample_scratch(classes)]);
    run(args, bfloat16, begin, end, scratch.get());
  });
  for (int64_t i = 0; i < count; ++i)
    if (args.tokens[i] < 0) return i;
  return -1;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "sample(Tensor logits, Tensor? rows, Tensor? seeds, Tensor? steps, int seed, int step, "
      "float temperature, int top_k, float top_p, float min_p, Tensor(a!) tokens, "
      "Tensor(b!) logprobs) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) { m.impl("sample", TORCH_BOX(&fastlm::sample)); }
