// One token per row of logits.
#include "sampling/sampling_row.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

template <typename T>
void sample_row(const SampleArgs& args, int64_t index, float* scratch) {
  Philox draw = philox(uint64_t(args.seeds ? args.seeds[index] : args.seed),
                       uint64_t(args.row_ids ? args.row_ids[index] : index),
                       uint64_t(args.steps ? args.steps[index] : args.step));
  Drawn drawn = draw_token(static_cast<const T*>(args.logits) + index * args.stride, args.classes,
                           args.options, draw, -1, scratch);
  args.tokens[index] = drawn.token;
  args.logprobs[index] = drawn.softmax.logprob;
}

}  // namespace

void sample_rows(const SampleArgs& args, bool bfloat16, int64_t begin, int64_t end,
                 float* scratch) {
  for (int64_t index = begin; index < end; ++index) {
    if (bfloat16) {
      sample_row<BFloat16>(args, index, scratch);
    } else {
      sample_row<float>(args, index, scratch);
    }
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
