#include "common/binding.h"
#include "embedding_gru/embedding_gru.h"
#include "tokens/tokens.h"

namespace fastlm {
namespace {

constexpr int64_t kMaxLanes = 16;

int64_t padded(int64_t hidden) { return (hidden + kMaxLanes - 1) / kMaxLanes * kMaxLanes; }

}  // namespace

int64_t gru_forward_workspace(const GruShape& s) {
  int64_t width = padded(s.hidden);
  return 3 * width * (s.hidden + 1) + 3 * s.batch * (width + kSkew);
}

int64_t gru_backward_workspace(const GruShape& s) {
  int64_t width = padded(s.hidden);
  int64_t per_row = 2 * (3 * width + kSkew) + width + kSkew;
  return 3 * width * s.hidden + s.batch * per_row + 2 * 6 * width;
}

int gru_threads(const GruShape& s, int available) {
  // a step of one thread should take 2 us at least, several times a barrier; a core does about
  // 40 multiply-adds in a nanosecond
  int64_t useful = s.batch * 3 * s.hidden * s.hidden / (40 * 2000);
  int64_t columns = padded(s.hidden) / kMaxLanes;
  int64_t threads = useful < columns ? useful : columns;
  threads = threads < available ? threads : available;
  return threads < 1 ? 1 : int(threads);
}

namespace {

// `plan` holds rows [B], lengths [B], offsets [T], counts [T] of a batch of different lengths
GruShape shape_of(int64_t batch, int64_t tokens, int64_t hidden, bool batch_first, bool reverse,
                  const std::optional<Tensor>& plan) {
  GruShape s{};
  s.batch = batch;
  s.hidden = hidden;
  s.reverse = reverse;
  if (plan) {
    s.steps = plan->size(0) / 2 - batch;
    s.rows = static_cast<const int64_t*>(in(plan));
    s.lengths = s.rows + batch;
    s.offsets = s.lengths + batch;
    s.counts = s.offsets + s.steps;
    return s;
  }
  s.steps = tokens / batch;
  s.batch_stride = batch_first ? s.steps : 1;
  s.step_stride = batch_first ? 1 : batch;
  return s;
}

// sizes come from h_n [B, H] and out [N, H]
void gru_forward_cpu(const Tensor& table, const std::optional<Tensor>& index,
                     const std::optional<Tensor>& reset, const Tensor& w_hh,
                     const std::optional<Tensor>& b_hh, const std::optional<Tensor>& h0,
                     bool batch_first, bool reverse, const Tensor& output, const Tensor& h_n,
                     const std::optional<Tensor>& gates, const std::optional<Tensor>& plan,
                     bool round) {
  int64_t batch = h_n.size(0), hidden = h_n.size(1);
  GruForward args{};
  args.shape = shape_of(batch, output.size(0), hidden, batch_first, reverse, plan);
  args.table = floats(table);
  args.index = static_cast<const int64_t*>(in(index));
  args.reset = static_cast<const uint8_t*>(in(reset));
  args.w_hh = in(w_hh);
  args.bfloat16 = is_bfloat16(w_hh);
  args.b_hh = floats(b_hh);
  args.h0 = floats(h0);
  args.out = floats_out(output);
  args.h_n = floats_out(h_n);
  args.gates = gates ? floats_out(*gates) : nullptr;
  args.round = round;
  Workspace workspace = allocate(gru_forward_workspace(args.shape));
  args.workspace = workspace.get();
  auto kernel = FASTLM_PICK_BF16(gru_forward);
  parallel_team(gru_threads(args.shape, int(torch::stable::get_num_threads())),
                [&](Team& team, int rank) { kernel(args, team, rank); });
}

void gru_backward_cpu(const std::optional<Tensor>& doutput, const std::optional<Tensor>& dh_n,
                      const std::optional<Tensor>& index, const std::optional<Tensor>& reset,
                      const Tensor& w_hh, const std::optional<Tensor>& h0, const Tensor& output,
                      const Tensor& gates, bool batch_first, bool reverse,
                      const Tensor& dhidden_gates, const Tensor& dtable, const Tensor& dh0,
                      const Tensor& dbias, const std::optional<Tensor>& plan, bool round) {
  int64_t batch = dh0.size(0), hidden = dh0.size(1);
  GruBackward args{};
  args.shape = shape_of(batch, output.size(0), hidden, batch_first, reverse, plan);
  args.index = static_cast<const int64_t*>(in(index));
  args.reset = static_cast<const uint8_t*>(in(reset));
  args.w_hh = in(w_hh);
  args.bfloat16 = is_bfloat16(w_hh);
  args.h0 = floats(h0);
  args.out = floats(output);
  args.gates = floats(gates);
  args.dout = floats(doutput);
  args.dh_n = floats(dh_n);
  args.dhidden_gates = floats_out(dhidden_gates);
  args.dtable = floats_out(dtable);
  args.dh0 = floats_out(dh0);
  args.dbias = floats_out(dbias);
  args.round = round;
  Workspace workspace = allocate(gru_backward_workspace(args.shape));
  args.workspace = workspace.get();
  auto kernel = FASTLM_PICK_BF16(gru_backward);
  parallel_team(gru_threads(args.shape, int(torch::stable::get_num_threads())),
                [&](Team& team, int rank) { kernel(args, team, rank); });
}

// The plan of `tokens`, see tokens/tokens.h. `unique` and `offsets` are sized for min(N, V)
// distinct tokens; returns how many there are.
int64_t token_plan_cpu(const Tensor& tokens, int64_t vocabulary, const Tensor& unique,
                       const Tensor& inverse, const std::optional<Tensor>& offsets,
                       const std::optional<Tensor>& order) {
  auto ids = static_cast<const int64_t*>(in(tokens));
  TokenPlan plan(ids, tokens.numel(), vocabulary);
  plan.write(ids, static_cast<int64_t*>(out(unique)), static_cast<int64_t*>(out(inverse)),
             static_cast<int64_t*>(out(offsets)), static_cast<int64_t*>(out(order)));
  return plan.unique_size();
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "gru_forward(Tensor table, Tensor? index, Tensor? reset, Tensor w_hh, Tensor? b_hh, "
      "Tensor? h0, bool batch_first, bool reverse, Tensor(a!) output, "
      "Tensor(b!) h_n, Tensor(c!)? gates, Tensor? plan=None, bool round=False) -> ()");
  m.def(
      "gru_backward(Tensor? doutput, Tensor? dh_n, Tensor? index, Tensor? reset, Tensor w_hh, "
      "Tensor? h0, Tensor output, Tensor gates, bool batch_first, bool reverse, "
      "Tensor(a!) dhidden_gates, Tensor(b!) dtable, Tensor(c!) dh0, Tensor(d!) dbias, "
      "Tensor? plan=None, bool round=False) -> ()");
  m.def(
      "token_plan(Tensor tokens, int vocabulary, Tensor(a!) unique, Tensor(b!) inverse, "
      "Tensor(c!)? offsets, Tensor(d!)? order) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("gru_forward", TORCH_BOX(&fastlm::gru_forward_cpu));
  m.impl("gru_backward", TORCH_BOX(&fastlm::gru_backward_cpu));
  m.impl("token_plan", TORCH_BOX(&fastlm::token_plan_cpu));
}
