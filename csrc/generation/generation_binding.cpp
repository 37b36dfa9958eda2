#include <algorithm>

#include "common/binding.h"
#include "generation/generation.h"

namespace fastlm {
namespace {

constexpr int64_t kMaxLanes = 16;
// bytes of logits held at once: what a second-level cache takes, and eight rows at least
constexpr int64_t kLogitsFloats = 1 << 20, kLeastRows = 8;

int64_t padded(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

}  // namespace

int64_t generation_gates_size(int64_t hidden, int64_t depth, bool bfloat16) {
  return 3 * padded(hidden, kMaxLanes) * ((bfloat16 ? (depth + 1) / 2 : depth) + 1);
}
int64_t generation_head_size(int64_t classes, int64_t hidden, bool bfloat16) {
  return padded(classes, 3 * kMaxLanes) * ((bfloat16 ? (hidden + 1) / 2 : hidden) + 1);
}
int64_t generation_packed_size(const DecoderShape& s, bool bfloat16) {
  return generation_gates_size(s.hidden, s.embedding_dim, bfloat16) +
         (2 * s.layers - 1) * generation_gates_size(s.hidden, s.hidden, bfloat16) +
         generation_head_size(s.classes, s.hidden, bfloat16);
}
int64_t generation_panel_scratch(const DecoderShape& s) {
  return 2 * 3 * kMaxLanes * (std::max(s.embedding_dim, s.hidden) + 1);
}
int64_t generation_group(const DecoderShape& s, int64_t batch) {
  if (s.classes == 0) return batch;
  int64_t rows = std::max(kLeastRows, kLogitsFloats / s.classes / kLeastRows * kLeastRows);
  return std::min(rows, batch);
}
int64_t generation_draw_scratch(const DecoderShape& s, bool penalties) {
  return padded(sample_scratch(s.classes), kMaxLanes) + penalties * padded(s.classes, kMaxLanes);
}
int64_t generation_workspace(const DecoderShape& s, int64_t batch, int threads, bool penalties) {
  constexpr int64_t kSkew = 16;
  int64_t state = padded(s.hidden, kMaxLanes) + kSkew;
  int64_t logits = padded(s.classes, 3 * kMaxLanes) + kSkew;
  int64_t input = padded(s.embedding_dim, kMaxLanes) + kSkew;
  int64_t scratch = generation_draw_scratch(s, penalties);
  // slots: int64 in the array of floats
  return batch * (2 * s.layers * state + input) + generation_group(s, batch) * logits +
         threads * (scratch + generation_panel_scratch(s)) + 2 * (kMaxLanes + 3 * batch);
}

namespace {

const int64_t* ids(const Tensor& t) { return static_cast<const int64_t*>(in(t)); }
const int64_t* ids(const std::optional<Tensor>& t) { return t ? ids(*t) : nullptr; }
int64_t* ids_out(const Tensor& t) { return static_cast<int64_t*>(out(t)); }
float* floats_out(const std::optional<Tensor>& t) { return t ? fastlm::floats_out(*t) : nullptr; }

DecoderWeights weights_of(const std::optional<Tensor>& packed, const Tensor& addresses,
                          const Tensor& embedding, const std::optional<Tensor>& table,
                          const Tensor& h_n, int64_t classes, bool bfloat16) {
  DecoderShape shape{embedding.size(1), h_n.size(2), h_n.size(0), classes};
  STD_TORCH_CHECK(!packed || packed->numel() == generation_packed_size(shape, bfloat16),
                  "fastlm_C: packed weights of another shape");
  return {shape, bfloat16, floats(packed), ids(addresses), floats(embedding), floats(table)};
}

int threads_for(const DecoderWeights& w, int64_t batch) {
  // between two barriers a thread should work for 2 us at least; a core does about 40
  // multiply-adds in a nanosecond
  const DecoderShape& s = w.shape;
  int64_t work = 3 * s.hidden * s.hidden * (2 * s.layers - 1) + s.hidden * s.classes;
  if (!w.table) work += 3 * s.hidden * s.embedding_dim;
  int64_t useful = batch * work / ((s.layers + 2) * 40 * 2000);
  int64_t available = torch::stable::get_num_threads();
  return int(std::clamp<int64_t>(useful, 1, available));
}

// packs w into `packed` from `offset` on; returns where the next matrix goes
int64_t pack(const Tensor& w, const std::optional<Tensor>& bias, bool gates, int64_t offset,
             const Tensor& packed) {
  int64_t rows = w.size(0), depth = w.size(1);
  auto kernel = FASTLM_PICK(generation_pack);
  float* to = floats_out(packed) + offset;
  const bool bfloat16 = is_bfloat16(w);
  const void* from = in(w);
  const float* b = floats(bias);
  parallel_rows(FASTLM_PICK(generation_panels)(rows, gates), 1 + (1 << 14) / (depth + 1),
                [&](int64_t begin, int64_t end) {
                  kernel(from, bfloat16, b, rows, depth, gates, begin, end, to);
                });
  return offset + (gates ? generation_gates_size(rows / 3, depth, bfloat16)
                         : generation_head_size(rows, depth, bfloat16));
}

int64_t packed_size(int64_t embedding_dim, int64_t hidden, int64_t layers, int64_t classes,
                    bool bfloat16) {
  return generation_packed_size({embedding_dim, hidden, layers, classes}, bfloat16);
}

void step(const std::optional<Tensor>& packed, const Tensor& addresses, const Tensor& embedding,
          const std::optional<Tensor>& table, const Tensor& tokens, const Tensor& h,
          const Tensor& h_n, const std::optional<Tensor>& logits, int64_t classes, bool bfloat16) {
  GenerationStep args{};
  args.weights = weights_of(packed, addresses, embedding, table, h_n, classes, bfloat16);
  args.batch = h_n.size(1);
  args.tokens = ids(tokens);
  args.h0 = floats(h);
  args.h_n = fastlm::floats_out(h_n);
  args.logits = floats_out(logits);
  args.threads = threads_for(args.weights, args.batch);
  Workspace workspace =
      allocate(generation_workspace(args.weights.shape, args.batch, args.threads, false));
  args.workspace = workspace.get();
  auto kernel = FASTLM_PICK(generation_step);
  parallel_team(args.threads, [&](Team& team, int rank) { kernel(args, team, rank); });
}

// samples, or scores `given` where there is one
void generate(const std::optional<Tensor>& packed, const Tensor& addresses, const Tensor& embedding,
              const std::optional<Tensor>& table, int64_t classes, const Tensor& prompts,
              const Tensor& prompt_lengths, const Tensor& order, const std::optional<Tensor>& h0,
              const std::optional<Tensor>& given, const std::optional<Tensor>& given_lengths,
              const std::optional<Tensor>& stops, const Tensor& rows, int64_t seed, int64_t step,
              double temperature, int64_t top_k, double top_p, double min_p, const Tensor& tokens,
              const Tensor& logprobs, const Tensor& lengths, const Tensor& h_n,
              const std::optional<Tensor>& row_max, const std::optional<Tensor>& log_sum,
              const std::optional<Tensor>& output, const std::optional<Tensor>& gates,
              bool bfloat16, const std::optional<Tensor>& seen, double repetition, double presence,
              double frequency) {
  Generation args{};
  args.weights = weights_of(packed, addresses, embedding, table, h_n, classes, bfloat16);
  args.batch = h_n.size(1);
  args.prompts = ids(prompts);
  args.prompt_lengths = ids(prompt_lengths);
  args.order = ids(order);
  args.prompt_stride = prompts.size(1);
  args.h0 = floats(h0);
  args.given = ids(given);
  args.given_lengths = ids(given_lengths);
  args.stops = static_cast<const uint8_t*>(in(stops));
  args.row_ids = ids(rows);
  args.max_new = logprobs.size(1);
  args.seed = seed;
  args.first_step = step;
  args.sampling = {temperature, top_k, top_p, min_p};
  args.tokens = ids_out(tokens);
  args.logprobs = fastlm::floats_out(logprobs);
  args.lengths = ids_out(lengths);
  args.h_n = fastlm::floats_out(h_n);
  args.row_max = floats_out(row_max);
  args.log_sum = floats_out(log_sum);
  args.output = floats_out(output);
  args.gates = floats_out(gates);
  args.steps = output ? output->size(2) : 0;
  args.penalties = {repetition, presence, frequency};
  args.seen = static_cast<int32_t*>(out(seen));
  args.threads = threads_for(args.weights, args.batch);
  Workspace workspace =
      allocate(generation_workspace(args.weights.shape, args.batch, args.threads, args.seen));
  args.workspace = workspace.get();
  auto kernel = FASTLM_PICK(generation);
  parallel_team(args.threads, [&](Team& team, int rank) { kernel(args, team, rank); });
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "generation_packed_size(int embedding_dim, int hidden, int layers, int classes, "
      "bool bfloat16=False) -> int");
  m.def(
      "generation_pack(Tensor w, Tensor? bias, bool gates, int offset, Tensor(a!) packed) -> int");
  m.def(
      "generation_step(Tensor? packed, Tensor addresses, Tensor embedding, Tensor? table, Tensor "
      "tokens, Tensor h, "
      "Tensor(a!) h_n, Tensor(b!)? logits, int classes, bool bfloat16=False) "
      "-> ()");
  m.def(
      "generation(Tensor? packed, Tensor addresses, Tensor embedding, Tensor? table, int classes, "
      "Tensor prompts, "
      "Tensor prompt_lengths, Tensor order, Tensor? h0, Tensor? given, Tensor? given_lengths, "
      "Tensor? stops, Tensor rows, int seed, int step, float temperature, int top_k, float top_p, "
      "float min_p, Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) lengths, Tensor(d!) h_n, "
      "Tensor(e!)? row_max, Tensor(f!)? log_sum, Tensor(g!)? output, Tensor(h!)? gates, "
      "bool bfloat16=False, Tensor(i!)? seen=None, float repetition=1.0, float presence=0.0, "
      "float frequency=0.0) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("generation_pack", TORCH_BOX(&fastlm::pack));
  m.impl("generation_step", TORCH_BOX(&fastlm::step));
  m.impl("generation", TORCH_BOX(&fastlm::generate));
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CompositeExplicitAutograd, m) {
  m.impl("generation_packed_size", TORCH_BOX(&fastlm::packed_size));
}
