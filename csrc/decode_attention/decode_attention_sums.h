// Products of query rows with keys and weighted sums of values, for decode_attention_cpu.cpp alone;
// compiled once per instruction set.
#pragma once

#include "common/vec.h"
#include "decode_attention/decode_attention.h"

namespace {

// ---- float16

struct Half {
  uint16_t bits;
};

// the type is not in every C++ compiler that has the instruction
#if defined(__F16C__) && defined(__FLT16_MANT_DIG__)
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

constexpr int kChunk = int(kDecodeChunk);
constexpr int kRow = kChunk + kLanes;  // floats between the scores of two rows
constexpr int kAhead = 16;             // keys that are asked for before they are needed

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

// Two vectors of consecutive features. Those of bfloat16 come as its even and its odd ones: two
// instructions for a whole register, where the natural order needs ten.
template <typename T>
FASTLM_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
  a = load(p), b = load(p + kLanes);
}
FASTLM_INLINE void load_pair(const BFloat16* p, Vec& a, Vec& b) {
  typedef uint32_t Unaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
  const VecBits both = *reinterpret_cast<const Unaligned*>(p);
  a = (Vec)(both << 16), b = (Vec)(both & 0xffff0000u);
}
// feature of lane i of the pair
template <typename T>
constexpr int feature_of(int lane) {
  return lane;
}
template <>
constexpr int feature_of<BFloat16>(int lane) {
  return lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1;
}
template <typename T>
FASTLM_INLINE void store_pair(float* p, Vec a, Vec b) {
  float lanes[2 * kLanes];
  store(lanes, a), store(lanes + kLanes, b);
  for (int i = 0; i < 2 * kLanes; ++i) p[feature_of<T>(i)] = lanes[i];
}

// one row of queries as `dot_products` reads it: [padded], zero behind size
template <typename T>
FASTLM_INLINE void widen(const T* row, int64_t size, int64_t padded, float* q) {
  const int64_t paired = size / (2 * kLanes) * (2 * kLanes);
  for (int64_t d = 0; d < paired; d += 2 * kLanes)
    for (int i = 0; i < 2 * kLanes; ++i) q[d + i] = to_float(row[d + feature_of<T>(i)]);
  for (int64_t d = paired; d < padded; ++d) q[d] = d < size ? to_float(row[d]) : 0.f;
}

// asks for a row: for use soon, or later
template <bool kSoon, typename T>
FASTLM_INLINE void prefetch_row(const T* p, int64_t size) {
  const char* line = reinterpret_cast<const char*>(p);
  for (int64_t byte = 0; byte < size * int64_t(sizeof(T)); byte += 64) {
    if (kSoon)
      __builtin_prefetch(line + byte, 0, 3);
    else
      __builtin_prefetch(line + byte, 0, 2);
  }
}

// what a tile of query rows reads of one chunk: offsets of its keys in k and in v
template <typename T>
struct Keys {
  const T *k, *v;
  const int64_t *k_places, *v_places;
  int count;
  bool first;  // no tile has read them yet
};

// scores[r * kRow + j] = q_r . k_j for keys [0, count), and up to kLanes more of any value
template <typename T, int R>
FASTLM_INLINE void dot_products(const float* q, int64_t padded, int64_t size, int64_t value_size,
                                const Keys<T>& keys, float* scores) {
  constexpr int kKeys = kKeysOf<R>;
  const int64_t paired = size / (2 * kLanes) * (2 * kLanes);
  const int count = keys.count;
  for (int j = 0; j < count; j += kKeys) {
    const T* key[kKeys];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
      key[i] = keys.k + keys.k_places[j + i < count ? j + i : count - 1];
    if (keys.first)
      for (int i = j; i < j + kKeys && i < count; ++i) {
        if (i + kAhead < count) prefetch_row<true>(keys.k + keys.k_places[i + kAhead], size);
        prefetch_row<false>(keys.v + keys.v_places[i], value_size);
      }
    Vec sums[kLanes] = {};
    for (int64_t d = 0; d < paired; d += 2 * kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        Vec x, y;
        load_pair(key[i] + d, x, y);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r * kKeys + i] += x * load(q + r * padded + d);
          sums[r * kKeys + i] += y * load(q + r * padded + d + kLanes);
        }
      }
    }
    for (int64_t d = paired; d < size; d += kLanes) {
      const int tail = int(size - d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Vec x = tail < kLanes ? load_first(key[i] + d, tail, 0.f) : load(key[i] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sums[r * kKeys + i] += x * load(q + r * padded + d);
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

// out_r = sum_j p[r][j] * v_j over kPairs pairs of vectors of features from d on
template <typename T, int R, int kPairs>
FASTLM_INLINE void weighted_pairs(const float* p, const Keys<T>& keys, int64_t d, float* out,
                                  int64_t out_row) {
  Vec sums[R][2 * kPairs] = {};
  for (int j = 0; j < keys.count; ++j) {
    const T* value = keys.v + keys.v_places[j] + d;
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      Vec x, y;
      load_pair(value + 2 * i * kLanes, x, y);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r][2 * i] += p[r * kRow + j] * x;
        sums[r][2 * i + 1] += p[r * kRow + j] * y;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i)
      store_pair<T>(out + r * out_row + d + 2 * i * kLanes, sums[r][2 * i], sums[r][2 * i + 1]);
}

// the same over one vector of features, of which `lanes` lanes
template <typename T, int R>
FASTLM_INLINE void weighted_lanes(const float* p, const Keys<T>& keys, int64_t d, int lanes,
                                  float* out, int64_t out_row) {
  Vec sums[R] = {};
  for (int j = 0; j < keys.count; ++j) {
    const T* value = keys.v + keys.v_places[j] + d;
    const Vec x = lanes < kLanes ? load_first(value, lanes, 0.f) : load(value);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[r] += p[r * kRow + j] * x;
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (lanes < kLanes)
      store_first(out + r * out_row + d, sums[r], lanes);
    else
      store(out + r * out_row + d, sums[r]);
  }
}

template <typename T, int R, int kPairs>
FASTLM_INLINE void weighted_sums(const float* p, const Keys<T>& keys, int64_t d, int64_t size,
                                 float* out, int64_t out_row) {
  for (; d + 2 * kPairs * kLanes <= size; d += 2 * kPairs * kLanes)
    weighted_pairs<T, R, kPairs>(p, keys, d, out, out_row);
  if constexpr (kPairs > 1) {
    weighted_sums<T, R, kPairs / 2>(p, keys, d, size, out, out_row);
  } else {
    for (; d < size; d += kLanes) {
      const int lanes = int(size - d < kLanes ? size - d : kLanes);
      weighted_lanes<T, R>(p, keys, d, lanes, out, out_row);
    }
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
