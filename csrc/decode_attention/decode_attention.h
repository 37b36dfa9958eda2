// Attention of a few queries over a cache of keys and values; the mathematics stands in
// fastlm/ops/decode_attention/reference.py.
//
// The query rows of one key head (a group of heads times the queries) share every key that is read.
// Keys are cut into chunks at multiples of kDecodeChunk from the row's first slot on. Each chunk
// gives a maximum, a sum and a weighted sum of values, and these are folded in order: a row's
// result depends neither on the other rows of the batch nor on which thread took which chunk.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace fastlm {

// sizes and strides in elements everywhere

constexpr int64_t kDecodeChunk = 256;  // keys
constexpr int64_t kDecodeMostSize = 1024;
constexpr int64_t kDecodeTile = 4;   // query rows that one pass over a chunk takes
constexpr int64_t kDecodeUnit = 16;  // tiles that a task over all chunks keeps at a time

enum class CacheType { float32, bfloat16, float16 };

// [rows or blocks, slots, Hk, n], the last dimension contiguous
struct CacheView {
  const void* data;
  int64_t row, slot, head;
};

struct DecodeAttention {
  CacheType type;
  const void* q;  // [B, Sq, H, D], the last dimension contiguous
  int64_t q_batch, q_row, q_head;
  CacheView k, v;
  int64_t slots;           // of a cache row or block
  const int32_t* lengths;  // [B]
  int64_t appended;        // keys behind them
  const int32_t* table;    // [B, blocks of a row], or null
  int64_t table_row;
  const int32_t *cache_row, *leftpad;  // [B], or null
  int64_t batch, queries, heads, key_heads, size, value_size;
  const float* slopes;  // [H] or [B, H], or null
  int64_t slopes_batch;
  const float* sink;  // [H], or null
  float scale, softcap;
  int64_t left, right;  // limits of the band, or a negative number
  void* out;            // [B, Sq, H, Dv], contiguous
  float* lse;           // [B, H, Sq], contiguous

  int64_t group() const { return heads / key_heads; }
  int64_t rows() const { return group() * queries; }  // of one key head
  int64_t tiles() const { return (rows() + kDecodeTile - 1) / kDecodeTile; }
  int64_t stop(int64_t b) const { return lengths[b] + appended; }
  // the first key that a query of row b may attend to
  int64_t start(int64_t b) const {
    int64_t first = leftpad ? leftpad[b] : 0;
    int64_t window = left >= 0 ? stop(b) - queries - left : 0;
    return first > window ? first : window > 0 ? window : 0;
  }
  int64_t first_chunk(int64_t b) const { return start(b) / kDecodeChunk; }
  int64_t chunks(int64_t b) const {
    return start(b) < stop(b) ? (stop(b) - 1) / kDecodeChunk + 1 - first_chunk(b) : 0;
  }
  int64_t partial_size() const { return value_size + 2; }
};

// chunks [begin, end) of all chunks of the batch times the key heads, the latter fastest; the
// chunks of row b begin at starts[b]. Each writes its partials [rows][value_size + 2].
FASTLM_PER_ISA(void, decode_attention_chunks,
               (const DecodeAttention& a, const int64_t* starts, float* partials, int64_t begin,
                int64_t end))
// outs from the partials, which are written to: query rows [begin, end) of [B, key heads, rows]
FASTLM_PER_ISA(void, decode_attention_fold,
               (const DecodeAttention& a, const int64_t* starts, float* partials, int64_t begin,
                int64_t end))
// the same outs without partials in memory: units [begin, end) of [B, key heads, units of tiles],
// with room for (kDecodeUnit + 1) * kDecodeTile partials
FASTLM_PER_ISA(void, decode_attention_whole,
               (const DecodeAttention& a, float* room, int64_t begin, int64_t end))

}  // namespace fastlm
