#include <algorithm>
#include <atomic>
#include <vector>

#include "attention/attention.h"
#include "common/binding.h"

namespace fastlm {
namespace {

using OptionalTensor = std::optional<Tensor>;

// multiply-adds of a part that is worth a thread
constexpr int64_t kLeastPart = 1 << 18;
// queries and sums of a task of a forward: 600 KB
constexpr int64_t kTaskFloats = 150 << 10;
// a sequence is cut into this many tasks of a backward, if it has not as many heads; fixed, since
// the cut decides the order of its sums
constexpr int64_t kTasksOfSequence = 8;
// a multiple of every instruction set's tile of queries
constexpr int64_t kRowsOfBiasTask = 192;

Type type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "fastlm_C: float32, bfloat16 or float16 only");
  return type == ScalarType::Float      ? Type::float32
         : type == ScalarType::BFloat16 ? Type::bfloat16
                                        : Type::float16;
}

Heads heads_of(const Tensor& t) {
  return {const_cast<void*>(in(t)), t.stride(0), t.stride(1), t.stride(2)};
}
const int32_t* int32s(const OptionalTensor& t) { return static_cast<const int32_t*>(in(t)); }
// 0 where a dimension is broadcast
int64_t stride_of(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lo,
                       const OptionalTensor& hi, const OptionalTensor& slopes,
                       const OptionalTensor& sink, const OptionalTensor& bias, int64_t seed,
                       double scale, int64_t left, int64_t right, double softcap, double dropout) {
  Attention a{};
  a.rows = q.size(1), a.keys = k.size(1), a.heads = q.size(2), a.key_heads = k.size(2);
  a.size = q.size(3), a.value_size = v.size(3);
  a.q = heads_of(q), a.k = heads_of(k), a.v = heads_of(v);
  a.type = type_of(q);
  a.pairs = a.type == Type::bfloat16 && FASTLM_PICK(multiplies_pairs)();
  a.scale = float(scale), a.softcap = float(softcap);
  a.left = left, a.right = right;
  a.lo = int32s(lo), a.hi = int32s(hi);
  if (lo) {
    a.limits_batch = stride_of(*lo, 0);
    a.limits_head = stride_of(*lo, 1);
    a.limits_row = lo->stride(2);
  }
  a.slopes = floats(slopes);
  if (slopes) a.slopes_batch = stride_of(*slopes, 0);
  a.sink = floats(sink);
  a.bias = in(bias);
  if (bias) {
    a.bias_type = type_of(*bias);
    a.bias_batch = stride_of(*bias, 0), a.bias_head = stride_of(*bias, 1);
    a.bias_row = stride_of(*bias, 2), a.bias_key = stride_of(*bias, 3);
  }
  a.dropout = dropout;
  a.seed = uint64_t(seed);
  return a;
}

std::vector<Sequence> sequences_of(const Attention& a, int64_t batch,
                                   const OptionalTensor& starts_q, const OptionalTensor& starts_k) {
  std::vector<Sequence> found;
  if (!starts_q || !starts_k) {
    for (int64_t b = 0; b < batch; ++b) found.push_back({b, 0, a.rows, 0, a.keys, true});
    return found;
  }
  const int32_t *q = int32s(starts_q), *k = int32s(starts_k);
  const int64_t count = starts_q->size(0) - 1;
  for (int64_t i = 0; i < count; ++i)
    found.push_back({0, q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i], true});
  found.push_back({0, q[count], a.rows - q[count], k[count], a.keys - k[count], false});
  return found;
}

// pairs of rows and keys between places [begin, end) of a sequence and its keys, at most
double pairs_of(const Attention& a, const Sequence& s, int64_t begin, int64_t end) {
  if (!s.attends) return 0;
  const int64_t shift = s.keys - s.rows;
  int64_t low = 0, high = s.keys;
  if (a.left >= 0 && a.left < begin + shift) low = begin + shift - a.left;
  if (a.right >= 0 && a.right < high - (end + shift))
    high = std::max<int64_t>(0, end + shift + a.right);
  return double(end - begin) * double(std::max<int64_t>(0, high - low));
}

// body(task, workspace) for every task, the largest first; which thread takes one does not matter
template <class Task, class Body>
void run_tasks(std::vector<std::pair<double, Task>>& tasks, double multiplications,
               int64_t workspace, const Body& body) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const auto& x, const auto& y) { return x.first > y.first; });
  const int64_t useful = std::max<int64_t>(1, int64_t(std::min(multiplications / kLeastPart, 1e6)));
  const int64_t members =
      std::min<int64_t>({int64_t(torch::stable::get_num_threads()), useful, int64_t(tasks.size())});
  std::atomic<size_t> next{0};
  parallel_rows(members, 1, [&](int64_t, int64_t) {
    Workspace own = allocate(workspace);
    for (size_t i = next++; i < tasks.size(); i = next++) body(tasks[i].second, own.get());
  });
}

// Large, since a task packs the keys for itself, but its queries and sums are to stay in the
// second-level cache, and each thread is to have some tasks: the more of them the larger they are,
// so that the last ones end together.
int64_t rows_of_task(const Attention& a, const std::vector<Sequence>& sequences) {
  const int64_t unit = FASTLM_PICK(attention_block_rows)();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t floats = a.size / (a.pairs ? 2 : 1) + a.value_size;
  for (int64_t rows = 128 * unit;; rows /= 2) {
    int64_t tasks = 0;
    for (const Sequence& s : sequences)
      tasks += (s.rows * a.group() + rows - 1) / rows * a.key_heads;
    const int64_t wanted = (rows > 32 * unit ? 12 : 4) * threads;
    const bool fits = rows <= 32 * unit || rows * floats <= kTaskFloats;
    if ((fits && tasks >= wanted) || rows == 4 * unit) return rows;
  }
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lo,
             const OptionalTensor& hi, const OptionalTensor& starts_q,
             const OptionalTensor& starts_k, const OptionalTensor& slopes,
             const OptionalTensor& sink, const OptionalTensor& bias, int64_t seed, double scale,
             int64_t left, int64_t right, double softcap, double dropout, const Tensor& out,
             const Tensor& lse) {
  AttentionForward f{};
  f.shared =
      attention_of(q, k, v, lo, hi, slopes, sink, bias, seed, scale, left, right, softcap, dropout);
  f.out = fastlm::out(out), f.lse = floats_out(lse);
  const Attention& a = f.shared;
  const std::vector<Sequence> sequences = sequences_of(a, q.size(0), starts_q, starts_k);
  const int64_t most = rows_of_task(a, sequences), group = a.group();
  std::vector<std::pair<double, ForwardTask>> tasks;
  double pairs = 0;
  int64_t largest = 0;
  for (const Sequence& s : sequences) {
    const int64_t rows = s.rows * group;
    largest = std::max(largest, std::min(rows, most));
    for (int64_t begin = 0; begin < rows; begin += most) {
      const int64_t end = std::min(rows, begin + most);
      const double cost = pairs_of(a, s, begin / group, (end - 1) / group + 1) * double(group);
      for (int64_t head = 0; head < a.key_heads; ++head)
        tasks.push_back({cost, {s, head, begin, end}});
      pairs += cost * double(a.key_heads);
    }
  }
  if (tasks.empty()) return;
  auto run = FASTLM_PICK(attention_forward);
  run_tasks(tasks, pairs * double(a.size + a.value_size),
            FASTLM_PICK(attention_forward_workspace)(a, largest),
            [&](const ForwardTask& task, float* workspace) { run(f, task, workspace); });
}

// how the backward of one sequence is cut, by its own sizes alone
struct Cut {
  int64_t of_group, of_keys, tiles;  // parts, and key tiles of a part
};
Cut cut(const Attention& a, const Sequence& s) {
  const int64_t all = (s.keys + kKeyTile - 1) / kKeyTile;
  const int64_t of_group = std::min(a.group(), (kTasksOfSequence + a.key_heads - 1) / a.key_heads);
  const int64_t wanted = std::max<int64_t>(1, kTasksOfSequence / (a.key_heads * of_group));
  const int64_t tiles = std::max<int64_t>(4, (all + wanted - 1) / wanted);
  return {of_group, std::max<int64_t>(1, (all + tiles - 1) / tiles), tiles};
}

struct Backward {
  AttentionBackward f{};
  std::vector<std::pair<double, BackwardTask>> tasks;
  std::vector<PartialSums> sums;
  std::vector<double> dslopes, dsink;  // of [sequence, H, part of the keys]
  int64_t parts = 1;                   // most parts of the keys
  double pairs = 0;
  int64_t rows = 0, keys = 0;
};

// heads [first, last) of the query group that part `i` takes
int64_t head_from(const Attention& a, int64_t key_head, int64_t i, int64_t parts) {
  return key_head * a.group() + a.group() * i / parts;
}

struct Partials {
  int64_t dq, dk, dv;  // floats of one sum
};
Partials partials(const Attention& a, const Sequence& s) {
  auto panels = FASTLM_PICK(attention_panels);
  return {panels(s.rows, a.size), panels(s.keys, a.size), panels(s.keys, a.value_size)};
}
int64_t partial_floats(const Attention& a, const Sequence& s) {
  const Cut c = cut(a, s);
  const Partials p = partials(a, s);
  return (c.of_keys > 1 ? c.of_keys * a.heads * p.dq : 0) +
         (c.of_group > 1 ? c.of_group * a.key_heads * (p.dk + p.dv) : 0);
}

char* element(void* data, int64_t at, Type type) {
  return static_cast<char*>(data) + at * (type == Type::float32 ? 4 : 2);
}

void add_sequence(Backward& b, const Sequence& s, int64_t index, float* space) {
  const Attention& a = b.f.shared;
  const Cut c = cut(a, s);
  const Partials p = partials(a, s);
  float *dq = space, *dk = dq + (c.of_keys > 1 ? c.of_keys * a.heads * p.dq : 0);
  float* dv = dk + (c.of_group > 1 ? c.of_group * a.key_heads * p.dk : 0);
  for (int64_t key_head = 0; key_head < a.key_heads; ++key_head) {
    for (int64_t g = 0; g < c.of_group; ++g) {
      for (int64_t part = 0; part < c.of_keys; ++part) {
        BackwardTask t{};
        t.sequence = s, t.key_head = key_head;
        t.first_head = head_from(a, key_head, g, c.of_group);
        t.last_head = head_from(a, key_head, g + 1, c.of_group);
        t.begin = part * c.tiles, t.end = t.begin + c.tiles;
        // [part][H]; [part of the group][Hk]
        if (c.of_keys > 1) t.dq = dq + (part * a.heads + t.first_head) * p.dq;
        if (c.of_group > 1) {
          t.dk = dk + (g * a.key_heads + key_head) * p.dk;
          t.dv = dv + (g * a.key_heads + key_head) * p.dv;
        }
        const int64_t at = (index * b.parts + part) * a.heads + t.first_head;
        if (b.f.wants_slopes) t.dslopes = b.dslopes.data() + at;
        if (!b.dsink.empty() && part == 0) t.dsink = b.dsink.data() + at;
        const double cost = pairs_of(a, s, 0, s.rows) * double(t.last_head - t.first_head);
        b.tasks.push_back({cost * double(part + 1), t});
        b.pairs += cost / double(c.of_keys);
      }
    }
  }
  if (c.of_keys > 1)
    for (int64_t head = 0; head < a.heads; ++head)
      b.sums.push_back(
          {dq + head * p.dq, c.of_keys, a.heads * p.dq, s.rows, a.size, a.scale,
           element(b.f.dq, ((s.batch * a.rows + s.first_row) * a.heads + head) * a.size, a.type),
           a.heads * a.size, a.type});
  if (c.of_group > 1)
    for (int64_t head = 0; head < a.key_heads; ++head) {
      const int64_t row = (s.batch * a.keys + s.first_key) * a.key_heads + head;
      b.sums.push_back({dk + head * p.dk, c.of_group, a.key_heads * p.dk, s.keys, a.size, a.scale,
                        element(b.f.dk, row * a.size, a.type), a.key_heads * a.size, a.type});
      b.sums.push_back({dv + head * p.dv, c.of_group, a.key_heads * p.dv, s.keys, a.value_size, 1.f,
                        element(b.f.dv, row * a.value_size, a.type), a.key_heads * a.value_size,
                        a.type});
    }
  b.rows = std::max(b.rows, s.rows);
  b.keys = std::max(b.keys, s.keys);
}

// the sum over sequences and parts of what tasks left for each head, to [B or 1, H]
void sum_heads(const Backward& b, const std::vector<Sequence>& sequences,
               const std::vector<double>& from, const OptionalTensor& to) {
  if (!to) return;
  const int64_t heads = b.f.shared.heads, batches = to->dim() == 2 ? to->size(0) : 1;
  std::vector<double> sum(size_t(batches * heads));
  for (size_t i = 0; i < from.size(); ++i) {
    const int64_t sequence = int64_t(i) / (b.parts * heads);
    const int64_t batch = batches > 1 ? sequences[size_t(sequence)].batch : 0;
    sum[size_t(batch * heads + int64_t(i) % heads)] += from[i];
  }
  float* result = floats_out(*to);
  for (size_t i = 0; i < sum.size(); ++i) result[i] = float(sum[i]);
}

// row tiles of the bias in parallel where it has rows, else all that adds to it in one task
void run_bias(Backward& b, const std::vector<Sequence>& sequences, const Tensor& dbias) {
  const Attention& a = b.f.shared;
  b.f.dbias = floats_out(dbias);
  b.f.dbias_batch = stride_of(dbias, 0), b.f.dbias_head = stride_of(dbias, 1);
  b.f.dbias_row = stride_of(dbias, 2), b.f.dbias_key = stride_of(dbias, 3);
  const Sequence *first = sequences.data(), *end = first + sequences.size();
  std::vector<std::pair<double, BiasTask>> tasks;
  const int64_t step = dbias.size(2) > 1 ? kRowsOfBiasTask : std::max<int64_t>(1, b.rows);
  const bool shared_heads = dbias.size(1) == 1;
  // the batch rows of a broadcast bias lie one behind the other; sequences of a packing do not
  const bool together = dbias.size(2) == 1 || a.rows == (first == end ? 0 : first->rows);
  while (first != end) {
    const bool alone = dbias.size(0) > 1 || !together;
    const Sequence* last = alone ? first + 1 : end;
    for (int64_t head = 0; head < a.heads; head += shared_heads ? a.heads : 1)
      for (int64_t row = 0; row < b.rows; row += step)
        tasks.push_back(
            {1, {first, last, head, shared_heads ? a.heads : head + 1, row, row + step}});
    first = last;
  }
  auto run = FASTLM_PICK(attention_bias);
  Attention singles = a;
  singles.pairs = false;
  run_tasks(tasks, b.pairs * double(a.size + a.value_size),
            FASTLM_PICK(attention_backward_workspace)(singles, std::min(step, b.rows), 0),
            [&](const BiasTask& task, float* workspace) { run(b.f, task, workspace); });
}

void backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& lo,
              const OptionalTensor& hi, const OptionalTensor& starts_q,
              const OptionalTensor& starts_k, const OptionalTensor& slopes,
              const OptionalTensor& sink, const OptionalTensor& bias, int64_t seed, double scale,
              int64_t left, int64_t right, double softcap, double dropout, const Tensor& dq,
              const Tensor& dk, const Tensor& dv, const OptionalTensor& dslopes,
              const OptionalTensor& dsink, const OptionalTensor& dbias) {
  Backward b;
  b.f.shared =
      attention_of(q, k, v, lo, hi, slopes, sink, bias, seed, scale, left, right, softcap, dropout);
  b.f.dout = heads_of(dout), b.f.out = heads_of(out);
  b.f.lse = floats(lse), b.f.dlse = floats(dlse);
  b.f.dq = fastlm::out(dq), b.f.dk = fastlm::out(dk), b.f.dv = fastlm::out(dv);
  b.f.wants_slopes = bool(dslopes);
  const Attention& a = b.f.shared;
  const std::vector<Sequence> sequences = sequences_of(a, q.size(0), starts_q, starts_k);
  int64_t floats = 0;
  for (const Sequence& s : sequences) {
    b.parts = std::max(b.parts, cut(a, s).of_keys);
    floats += partial_floats(a, s);
  }
  const size_t each = sequences.size() * size_t(b.parts * a.heads);
  if (dslopes) b.dslopes.resize(each);
  if (dsink) b.dsink.resize(each);
  Workspace space = allocate(floats);
  float* next = space.get();
  for (size_t i = 0; i < sequences.size(); ++i) {
    add_sequence(b, sequences[i], int64_t(i), next);
    next += partial_floats(a, sequences[i]);
  }
  auto run = FASTLM_PICK(attention_backward);
  if (!b.tasks.empty())
    run_tasks(b.tasks, b.pairs * double(3 * a.size + 2 * a.value_size),
              FASTLM_PICK(attention_backward_workspace)(a, b.rows, b.keys),
              [&](const BackwardTask& task, float* workspace) { run(b.f, task, workspace); });
  auto add = FASTLM_PICK(attention_sum);
  for (const PartialSums& sum : b.sums)
    parallel_rows(sum.rows, 256, [&](int64_t begin, int64_t end) { add(sum, begin, end); });
  sum_heads(b, sequences, b.dslopes, dslopes);
  sum_heads(b, sequences, b.dsink, dsink);
  if (dbias) run_bias(b, sequences, *dbias);
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? lo, Tensor? hi, Tensor? "
      "cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sink, Tensor? bias, int "
      "seed, float scale, int left, int right, float softcap, float dropout_p, Tensor(a!) out, "
      "Tensor(b!) lse) -> ()");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor? lo, Tensor? hi, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? "
      "alibi_slopes, Tensor? sink, Tensor? bias, int seed, float scale, int left, int right, "
      "float softcap, float dropout_p, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!)? "
      "dalibi_slopes, Tensor(e!)? dsink, Tensor(f!)? dbias) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastlm::forward));
  m.impl("attention_backward", TORCH_BOX(&fastlm::backward));
}
