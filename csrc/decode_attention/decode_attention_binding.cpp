#include <cstring>
#include <vector>

#include "common/binding.h"
#include "decode_attention/decode_attention.h"

namespace fastlm {
namespace {

using OptionalTensor = std::optional<Tensor>;

// multiply-adds worth a thread of their own
constexpr int64_t kLeastPart = 1 << 18;
// a key that one row needs costs as much as one that four rows share: it is the reading that takes
// the time
constexpr int64_t kRowsOfReading = 4;
// so many tasks over all chunks per thread are enough; with fewer the chunks are tasks
constexpr int64_t kTasksPerThread = 4;

CacheType type_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
      "fastlm_C: float32, bfloat16 or float16 only");
  return type == ScalarType::Float      ? CacheType::float32
         : type == ScalarType::BFloat16 ? CacheType::bfloat16
                                        : CacheType::float16;
}

CacheView view_of(const Tensor& t) { return {in(t), t.stride(0), t.stride(1), t.stride(2)}; }
const int32_t* int32s(const OptionalTensor& t) { return static_cast<const int32_t*>(in(t)); }

// every length fits and every block and row that is used exists
bool in_range(const DecodeAttention& a, int64_t cache_rows, int64_t blocks) {
  const int64_t most = a.table ? blocks * a.slots : a.slots;
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t length = a.lengths[b];
    if (length < 0 || length + a.appended > most) return false;
    if (a.cache_row && (a.cache_row[b] < 0 || a.cache_row[b] >= cache_rows)) return false;
    if (a.leftpad && a.leftpad[b] < 0) return false;
    if (!a.table) continue;
    const int64_t used = (length + a.appended + a.slots - 1) / a.slots;
    for (int64_t i = 0; i < used; ++i) {
      const int32_t block = a.table[b * a.table_row + i];
      if (block < 0 || block >= cache_rows) return false;
    }
  }
  return true;
}

// new keys [B, S_new, Hk, n] to the end of their rows
void append(const DecodeAttention& a, const Tensor& fresh, const Tensor& cache) {
  const int64_t bytes = a.type == CacheType::float32 ? 4 : 2, size = fresh.size(3) * bytes;
  const char* from = static_cast<const char*>(in(fresh));
  char* to = static_cast<char*>(out(cache));
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t i = 0; i < a.appended; ++i) {
      const int64_t position = a.lengths[b] + i;
      int64_t row = a.cache_row ? a.cache_row[b] : b, slot = position;
      if (a.table) {
        row = a.table[b * a.table_row + position / a.slots];
        slot = position % a.slots;
      }
      for (int64_t hk = 0; hk < a.key_heads; ++hk)
        std::memcpy(
            to + (row * cache.stride(0) + slot * cache.stride(1) + hk * cache.stride(2)) * bytes,
            from + (b * fresh.stride(0) + i * fresh.stride(1) + hk * fresh.stride(2)) * bytes,
            size_t(size));
    }
}

void attend(const DecodeAttention& a) {
  std::vector<int64_t> starts(size_t(a.batch + 1), 0);
  for (int64_t b = 0; b < a.batch; ++b) starts[size_t(b + 1)] = starts[size_t(b)] + a.chunks(b);
  const int64_t units = (a.tiles() + kDecodeUnit - 1) / kDecodeUnit;
  const int64_t tasks = a.batch * a.key_heads * units;
  if (a.tiles() > kDecodeUnit / 4 &&
      tasks >= kTasksPerThread * int64_t(torch::stable::get_num_threads())) {
    auto rows = FASTLM_PICK(decode_attention_whole);
    parallel_rows(tasks, 1, [&](int64_t begin, int64_t end) {
      Workspace room = allocate((kDecodeUnit + 1) * kDecodeTile * a.partial_size());
      rows(a, room.get(), begin, end);
    });
    return;
  }
  const int64_t parts = starts.back() * a.key_heads;
  Workspace partials = allocate(parts * a.rows() * a.partial_size());
  const int64_t rows = a.rows() > kRowsOfReading ? a.rows() : kRowsOfReading;
  // a chunk that is not full counts as what it holds
  int64_t longest = 0;
  for (int64_t b = 0; b < a.batch; ++b)
    if (a.chunks(b) && a.stop(b) - a.start(b) > longest) longest = a.stop(b) - a.start(b);
  const int64_t keys = longest < kDecodeChunk ? longest : kDecodeChunk;
  const int64_t work = keys * rows * (a.size + a.value_size);
  auto chunks = FASTLM_PICK(decode_attention_chunks);
  parallel_rows(
      parts, work > 0 ? (kLeastPart + work - 1) / work : 1,
      [&](int64_t begin, int64_t end) { chunks(a, starts.data(), partials.get(), begin, end); });
  auto fold = FASTLM_PICK(decode_attention_fold);
  const int64_t one = a.value_size * (starts.back() / (a.batch ? a.batch : 1) + 1);
  parallel_rows(
      a.batch * a.key_heads * a.rows(), (kLeastPart + one - 1) / one,
      [&](int64_t begin, int64_t end) { fold(a, starts.data(), partials.get(), begin, end); });
}

// false, and nothing done, where a length or an index is out of range
bool decode_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                      const OptionalTensor& k_new, const OptionalTensor& v_new,
                      const Tensor& cache_seqlens, const OptionalTensor& block_table,
                      const OptionalTensor& cache_batch_idx, const OptionalTensor& cache_leftpad,
                      const OptionalTensor& alibi_slopes, const OptionalTensor& sink, double scale,
                      int64_t left, int64_t right, double softcap, const Tensor& result,
                      const Tensor& lse) {
  DecodeAttention a{};
  a.type = type_of(q);
  a.q = in(q);
  a.q_batch = q.stride(0), a.q_row = q.stride(1), a.q_head = q.stride(2);
  a.k = view_of(k_cache), a.v = view_of(v_cache);
  a.slots = k_cache.size(1);
  a.lengths = static_cast<const int32_t*>(in(cache_seqlens));
  a.appended = k_new ? k_new->size(1) : 0;
  a.table = int32s(block_table);
  a.table_row = block_table ? block_table->stride(0) : 0;
  a.cache_row = int32s(cache_batch_idx), a.leftpad = int32s(cache_leftpad);
  a.batch = q.size(0), a.queries = q.size(1), a.heads = q.size(2), a.size = q.size(3);
  a.key_heads = k_cache.size(2), a.value_size = v_cache.size(3);
  a.slopes = floats(alibi_slopes), a.sink = floats(sink);
  a.slopes_batch = alibi_slopes && alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  a.scale = float(scale), a.softcap = float(softcap);
  a.left = left, a.right = right;
  a.out = out(result), a.lse = floats_out(lse);
  if (!in_range(a, k_cache.size(0), block_table ? block_table->size(1) : 0)) return false;
  if (k_new && a.appended > 0) {
    append(a, *k_new, k_cache);
    append(a, *v_new, v_cache);
  }
  if (a.batch * a.rows() > 0) attend(a);
  return true;
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "decode_attention(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_new, "
      "Tensor? v_new, Tensor cache_seqlens, Tensor? block_table, Tensor? cache_batch_idx, "
      "Tensor? cache_leftpad, Tensor? alibi_slopes, Tensor? sink, float scale, int left, "
      "int right, float softcap, Tensor(c!) result, Tensor(d!) lse) -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) {
  m.impl("decode_attention", TORCH_BOX(&fastlm::decode_attention));
}
