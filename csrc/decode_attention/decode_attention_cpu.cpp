#include "common/vec.h"
#include "decode_attention/decode_attention.h"

namespace {

// ---- float16

struct Half {
  uint16_t bits;
};

#if defined(__F16C__)
typedef _Float16 VecFloat16 __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
FASTLM_INLINE Vec load(const Half* p) {
  return __builtin_convertvector(*reinterpret_cast<const VecFloat16*>(p), Vec);
}
#else
FASTLM_INLINE Vec load(const Half* p) {
  VecHalf half = *reinterpret_cast<const VecHalfUnaligned*>(p);
  VecBits h = __builtin_convertvector(half, VecBits);
  VecBits magnitude = h & 0x7fff;
  // the exponent moved from bias 15 to 127 by a product, which normalises small numbers too
  VecBits bits = (VecBits)((Vec)(magnitude << 13) * 0x1p112f);
  bits |= magnitude >= 0x7c00 ? VecBits{} + 0x7f800000u : VecBits{};
  return (Vec)(bits | (h & 0x8000) << 16);
}
#endif
FASTLM_INLINE float to_float(Half x) {
  uint16_t buffer[kLanes] = {x.bits};
  return load(reinterpret_cast<const Half*>(buffer))[0];
}
// round to nearest even
FASTLM_INLINE void from_float(float x, Half* out) {
  union {
    float f;
    uint32_t u;
  } v{x};
  const uint32_t sign = v.u >> 16 & 0x8000, magnitude = v.u & 0x7fffffff;
  uint32_t h;
  if (magnitude > 0x7f800000) {
    h = 0x7e00;
  } else if (magnitude >= 0x47800000) {
    h = 0x7c00;
  } else if (magnitude < 0x38800000) {
    // below 2^-14 a step is 2^-24: added to 0.5, whose last bit is that, it rounds there
    v.u = magnitude;
    v.f += 0.5f;
    h = v.u - 0x3f000000;
  } else {
    h = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

}  // namespace

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kTile = int(kDecodeTile);
constexpr int kChunk = int(kDecodeChunk);
constexpr int kRow = kChunk + kLanes;  // floats between the scores of two rows
constexpr int kAhead = 8;              // keys that are asked for before they are needed

// ---- sums over features and keys

// three rows take the place of four
template <int R>
constexpr int kKeysOf = kLanes / (R == 3 ? 4 : R);

template <int Size>
FASTLM_INLINE void reduce_level(Vec (&block)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; i += 2 * Size) {
    exchange_blocks<Size>(block[i], block[i + Size]);
    block[i] += block[i + Size];
  }
}
// block[i] summed over its lanes, in lane i
FASTLM_INLINE Vec reduce_each(Vec (&block)[kLanes]) {
  reduce_level<1>(block);
  reduce_level<2>(block);
  if constexpr (kLanes > 4) reduce_level<4>(block);
  if constexpr (kLanes > 8) reduce_level<8>(block);
  return block[0];
}

template <typename T>
FASTLM_INLINE void prefetch_row(const T* p, int64_t size) {
  for (int64_t byte = 0; byte < size * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// scores[r * kChunk + j] = q_r . k_j for keys [0, count), and up to kLanes more of any value;
// q [R][padded], zero behind size
template <typename T, int R>
FASTLM_INLINE void dot_products(const float* q, int64_t padded, int64_t size, const T* k,
                                const int64_t* places, int count, float* scores) {
  constexpr int kKeys = kKeysOf<R>;
  const int64_t full = size / kLanes * kLanes;
  const int tail = int(size - full);
  for (int j = 0; j < count; j += kKeys) {
    const T* key[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) key[i] = k + places[j + i < count ? j + i : count - 1];
    for (int i = j + kAhead; i < j + kAhead + kKeys && i < count; ++i)
      prefetch_row(k + places[i], size);
    Vec sums[kLanes] = {};
    for (int64_t d = 0; d < full; d += kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec x = load(key[i] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * kKeys + i] += x * load(q + r * padded + d);
      }
    }
    if (tail) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec x = load_first(key[i] + full, tail, 0.f);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * kKeys + i] += x * load(q + r * padded + full);
      }
    }
    float each[kLanes];
    store(each, reduce_each(sums));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) scores[r * kRow + j + i] = each[r * kKeys + i];
  }
}

// out_r = sum_j p[r][j] * v_j over kVecs vectors of features, of the last one `lanes` lanes
template <typename T, int R, int kVecs>
FASTLM_INLINE void weighted_sum(const float* p, const T* v, const int64_t* places, int count,
                                int lanes, float* out, int64_t out_row) {
  Vec sums[R][kVecs] = {};
  for (int j = 0; j < count; ++j) {
    const T* value = v + places[j];
    if (j + kAhead < count) {
      const char* next = reinterpret_cast<const char*>(v + places[j + kAhead]);
#pragma GCC unroll 16
      for (int byte = 0; byte < kVecs * kLanes * int(sizeof(T)); byte += 64)
        __builtin_prefetch(next + byte);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      const Vec x =
          kVecs == 1 && lanes < kLanes ? load_first(value, lanes, 0.f) : load(value + i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][i] += p[r * kRow + j] * x;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < kVecs; ++i) {
      if (kVecs == 1 && lanes < kLanes)
        store_first(out + r * out_row, sums[r][i], lanes);
      else
        store(out + r * out_row + i * kLanes, sums[r][i]);
    }
}

template <typename T, int R>
FASTLM_INLINE void weighted_sums(const float* p, const T* v, const int64_t* places, int count,
                                 int64_t size, float* out, int64_t out_row) {
  // sums that fit in the registers: 32 of 16 lanes, 16 of fewer
  constexpr int kVecs = (kLanes == 16 ? 16 : 8) / (R == 3 ? 4 : R);
  int64_t d = 0;
  for (; d + kVecs * kLanes <= size; d += kVecs * kLanes)
    weighted_sum<T, R, kVecs>(p, v + d, places, count, kLanes, out + d, out_row);
  for (; d < size; d += kLanes) {
    const int lanes = int(size - d < kLanes ? size - d : kLanes);
    weighted_sum<T, R, 1>(p, v + d, places, count, lanes, out + d, out_row);
  }
}

// ---- one tile of query rows over one chunk of keys

// offset of each key of a chunk in k and in v, without its head
struct Places {
  int64_t k[kChunk], v[kChunk];
  int64_t row = -1, chunk = -1;

  void find(const DecodeAttention& a, int64_t b, int64_t c) {
    if (b == row && c == chunk) return;
    row = b, chunk = c;
    const int64_t first = c * kDecodeChunk, end = first + kDecodeChunk;
    const int64_t stop = a.stop(b) < end ? a.stop(b) : end;
    int64_t block = a.table ? first / a.slots : 0, slot = first - block * a.slots;
    int64_t at = a.cache_row ? a.cache_row[b] : b;
    for (int64_t j = first; j < stop; ++j, ++slot) {
      if (a.table) {
        if (slot == a.slots) slot = 0, ++block;
        at = a.table[b * a.table_row + block];
      }
      k[j - first] = at * a.k.row + slot * a.k.slot;
      v[j - first] = at * a.v.row + slot * a.v.slot;
    }
  }
};

// query rows of key head hk: row m is query m / group of head hk * group + m % group
struct Tile {
  int64_t b, hk, first;
  int rows;
};

struct Range {
  int64_t begin, end;
};
// the keys of query i of row b
FASTLM_INLINE Range keys_of(const DecodeAttention& a, int64_t b, int64_t i) {
  const int64_t place = a.stop(b) - a.queries + i;
  int64_t begin = a.leftpad ? a.leftpad[b] : 0, end = a.stop(b);
  if (a.left >= 0 && place - a.left > begin) begin = place - a.left;
  if (a.right >= 0 && place + a.right + 1 < end) end = place + a.right + 1;
  return {begin, end};
}

FASTLM_INLINE Vec lane_numbers() {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = float(i);
  return x;
}

// dot products of query row m with keys `begin` to `begin` + count - 1 to exp(score - maximum),
// 0 where it does not attend
FASTLM_INLINE void softmax_row(const DecodeAttention& a, const Tile& tile, int64_t m, int64_t begin,
                               int count, float* s, float* maximum, float* sum) {
  const int64_t i = m / a.group(), head = tile.hk * a.group() + m % a.group();
  const Range keys = keys_of(a, tile.b, i);
  const int64_t low = keys.begin - begin, high = keys.end - begin;
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  if (a.softcap > 0 || a.slopes) {
    const float slope = a.slopes ? a.slopes[tile.b * a.slopes_batch + head] : 0.f;
    const int64_t ahead = begin - (a.stop(tile.b) - a.queries + i);
    for (int j = 0; j < padded; j += kLanes) {
      Vec x = load(s + j) * a.scale;
      if (a.softcap > 0) x = tanh(x * (1.f / a.softcap)) * a.softcap;
      const Vec distance = lane_numbers() + float(ahead + j);
      store(s + j, x - slope * (distance < 0.f ? -distance : distance));
    }
  } else {
    for (int j = 0; j < padded; j += kLanes) store(s + j, load(s + j) * a.scale);
  }
  for (int64_t j = 0; j < low && j < count; ++j) s[j] = -kInfinity;
  for (int64_t j = high < count ? (high > 0 ? high : 0) : count; j < padded; ++j) s[j] = -kInfinity;
  Vec largest = broadcast(-kInfinity);
  for (int j = 0; j < padded; j += kLanes) largest = max(load(s + j), largest);
  float top = reduce_max(largest);
  if (top == -kInfinity) top = 0.f;
  Vec total{};
  for (int j = 0; j < padded; j += kLanes) {
    const Vec p = exp(load(s + j) - top);
    store(s + j, p);
    total += p;
  }
  *maximum = top;
  *sum = reduce_add(total);
}

// one partial per row of the tile: weighted values, maximum, sum
template <typename T, int R>
__attribute__((noinline)) void rows_of(const DecodeAttention& a, const Tile& tile, int64_t chunk,
                                       const Places& places, float* partial) {
  const int64_t first = chunk * kDecodeChunk, width = a.partial_size();
  const Range low = keys_of(a, tile.b, tile.first / a.group());
  const Range high = keys_of(a, tile.b, (tile.first + R - 1) / a.group());
  const int64_t begin = low.begin > first ? low.begin : first;
  const int64_t end = high.end < first + kDecodeChunk ? high.end : first + kDecodeChunk;
  if (end <= begin) {
    for (int r = 0; r < R; ++r) partial[r * width + a.value_size + 1] = 0.f;
    return;
  }
  const int count = int(end - begin), skip = int(begin - first);
  float q[R * kDecodeMostSize];
  const int64_t padded = (a.size + kLanes - 1) / kLanes * kLanes;
  for (int r = 0; r < R; ++r) {
    const int64_t m = tile.first + r, head = tile.hk * a.group() + m % a.group();
    const T* row =
        static_cast<const T*>(a.q) + tile.b * a.q_batch + m / a.group() * a.q_row + head * a.q_head;
    for (int64_t d = 0; d < padded; ++d) q[r * padded + d] = d < a.size ? to_float(row[d]) : 0.f;
  }
  float scores[R * kRow];
  const T* k = static_cast<const T*>(a.k.data) + tile.hk * a.k.head;
  dot_products<T, R>(q, padded, a.size, k, places.k + skip, count, scores);
  for (int r = 0; r < R; ++r) {
    float* ends = partial + r * width + a.value_size;
    softmax_row(a, tile, tile.first + r, begin, count, scores + r * kRow, ends, ends + 1);
  }
  const T* v = static_cast<const T*>(a.v.data) + tile.hk * a.v.head;
  weighted_sums<T, R>(scores, v, places.v + skip, count, a.value_size, partial, width);
}

template <typename T>
void tile_of(const DecodeAttention& a, const Tile& tile, int64_t chunk, const Places& places,
             float* partial) {
  if (tile.rows == 4) return rows_of<T, 4>(a, tile, chunk, places, partial);
  if (tile.rows == 3) return rows_of<T, 3>(a, tile, chunk, places, partial);
  if (tile.rows == 2) return rows_of<T, 2>(a, tile, chunk, places, partial);
  rows_of<T, 1>(a, tile, chunk, places, partial);
}

FASTLM_INLINE Tile tile_at(const DecodeAttention& a, int64_t b, int64_t hk, int64_t tile) {
  const int64_t first = tile * kTile, left = a.rows() - first;
  return {b, hk, first, int(left < kTile ? left : kTile)};
}

// ---- from partials to outs

FASTLM_INLINE float exp_of(float x) { return exp(broadcast(x))[0]; }

// adds a partial to the sums before it; one function for both ways, so that both round alike
__attribute__((noinline)) void fold(int64_t size, const float* part, float* sums) {
  if (part[size + 1] == 0.f) return;
  if (sums[size + 1] == 0.f) {
    for (int64_t d = 0; d < size + 2; ++d) sums[d] = part[d];
    return;
  }
  const float top = sums[size] > part[size] ? sums[size] : part[size];
  const float a = exp_of(sums[size] - top), b = exp_of(part[size] - top);
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) store(sums + d, load(sums + d) * a + load(part + d) * b);
  for (; d < size; ++d) sums[d] = sums[d] * a + part[d] * b;
  sums[size + 1] = sums[size + 1] * a + part[size + 1] * b;
  sums[size] = top;
}

// query row m of key head hk from its sums, null where there are none
template <typename T>
void finish(const DecodeAttention& a, int64_t b, int64_t hk, int64_t m, const float* sums) {
  const int64_t i = m / a.group(), head = hk * a.group() + m % a.group();
  T* out = static_cast<T*>(a.out) + ((b * a.queries + i) * a.heads + head) * a.value_size;
  float total = sums ? sums[a.value_size + 1] : 0.f;
  float top = total == 0.f ? -kInfinity : sums[a.value_size], share = 1.f;
  if (a.sink) {
    const float sink = a.sink[head], before = top;
    top = sink > top ? sink : top;
    share = exp_of(before - top);
    total = total * share + exp_of(sink - top);
  }
  a.lse[(b * a.heads + head) * a.queries + i] =
      total == 0.f ? -kInfinity : float(top + __builtin_log(double(total)));
  const bool empty = !sums || sums[a.value_size + 1] == 0.f;
  share /= total;
  for (int64_t d = 0; d < a.value_size; ++d) from_float(empty ? 0.f : sums[d] * share, out + d);
}

// ---- tasks

template <typename T>
void chunks(const DecodeAttention& a, const int64_t* starts, float* partials, int64_t begin,
            int64_t end) {
  Places places;
  int64_t b = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t unit = t / a.key_heads, hk = t % a.key_heads;
    while (starts[b + 1] <= unit) ++b;
    const int64_t chunk = a.first_chunk(b) + unit - starts[b];
    places.find(a, b, chunk);
    for (int64_t i = 0; i < a.tiles(); ++i)
      tile_of<T>(a, tile_at(a, b, hk, i), chunk, places,
                 partials + (t * a.rows() + i * kTile) * a.partial_size());
  }
}

template <typename T>
void fold_rows(const DecodeAttention& a, const int64_t* starts, float* partials, int64_t begin,
               int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t m = t % a.rows(), hk = t / a.rows() % a.key_heads;
    const int64_t b = t / a.rows() / a.key_heads;
    float* sums = nullptr;
    for (int64_t unit = starts[b]; unit < starts[b + 1]; ++unit) {
      float* part = partials + ((unit * a.key_heads + hk) * a.rows() + m) * a.partial_size();
      if (sums)
        fold(a.value_size, part, sums);
      else
        sums = part;
    }
    finish<T>(a, b, hk, m, sums);
  }
}

template <typename T>
void whole(const DecodeAttention& a, float* room, int64_t begin, int64_t end) {
  Places places;
  const int64_t width = a.partial_size(), size = a.value_size;
  const int64_t units = (a.tiles() + kDecodeUnit - 1) / kDecodeUnit;
  float* part = room + kDecodeUnit * kTile * width;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t unit = t % units, hk = t / units % a.key_heads, b = t / units / a.key_heads;
    const int64_t first = unit * kDecodeUnit;
    const int64_t last = first + kDecodeUnit < a.tiles() ? first + kDecodeUnit : a.tiles();
    for (int64_t m = 0; m < kDecodeUnit * kTile; ++m) room[m * width + size + 1] = 0.f;
    for (int64_t c = a.first_chunk(b); c < a.first_chunk(b) + a.chunks(b); ++c) {
      places.find(a, b, c);
      for (int64_t i = first; i < last; ++i) {
        const Tile tile = tile_at(a, b, hk, i);
        tile_of<T>(a, tile, c, places, part);
        for (int r = 0; r < tile.rows; ++r)
          fold(size, part + r * width, room + ((i - first) * kTile + r) * width);
      }
    }
    for (int64_t m = first * kTile; m < last * kTile && m < a.rows(); ++m)
      finish<T>(a, b, hk, m, room + (m - first * kTile) * width);
  }
}

}  // namespace

void decode_attention_chunks(const DecodeAttention& a, const int64_t* starts, float* partials,
                             int64_t begin, int64_t end) {
  auto run = a.type == CacheType::float32    ? chunks<float>
             : a.type == CacheType::bfloat16 ? chunks<BFloat16>
                                             : chunks<Half>;
  run(a, starts, partials, begin, end);
}

void decode_attention_fold(const DecodeAttention& a, const int64_t* starts, float* partials,
                           int64_t begin, int64_t end) {
  auto run = a.type == CacheType::float32    ? fold_rows<float>
             : a.type == CacheType::bfloat16 ? fold_rows<BFloat16>
                                             : fold_rows<Half>;
  run(a, starts, partials, begin, end);
}

void decode_attention_whole(const DecodeAttention& a, float* room, int64_t begin, int64_t end) {
  auto run = a.type == CacheType::float32    ? whole<float>
             : a.type == CacheType::bfloat16 ? whole<BFloat16>
                                             : whole<Half>;
  run(a, room, begin, end);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
