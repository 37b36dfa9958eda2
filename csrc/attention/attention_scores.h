// From products q.k to scores in base 2: scale, softcap, ALiBi, bias, mask; and the dropout mask.
#pragma once

#include "attention/attention_tiles.h"
#include "common/philox.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int kKeys = kKeyTile;
// blocks of rows that go through a tile of keys together
constexpr int kTogether = 2;

FASTLM_INLINE Vec lanes() {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = float(i);
  return x;
}
FASTLM_INLINE VecInt lane_numbers() {
  VecInt x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// the larger of the two, in one instruction; b where one of them is NaN
FASTLM_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  Vec x;  // the compiler makes two of the comparison
  asm("vmaxps %2, %1, %0" : "=v"(x) : "v"(a), "v"(b));
  return x;
#else
  return a > b ? a : b;
#endif
}

// 2^x for x below 127; 0 below -126.5, NaN stays. Within 1 ulp by the Cephes polynomial (S.
// Moshier). Step by step for all of x: one chain after the other would wait for its own results.
template <int N>
FASTLM_INLINE void exp2(Vec (&x)[N], Singles) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kTerm[] = {1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f,
                             5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f};
  Vec shifted[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = larger(broadcast(-127.f), x[i]);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) shifted[i] = x[i] + kMagic;
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) x[i] = x[i] - (shifted[i] - kMagic);
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = x[i] * kTerm[0] + kTerm[1];
#pragma GCC unroll 6
  for (int t = 2; t < 6; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = p[i] * x[i] + kTerm[t];
  }
  // at -127 the exponent's bits are 0, and so is the result
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i)
    x[i] = (p[i] * x[i] + 1.f) * (Vec)(((VecBits)shifted[i] << 23) + 0x3f800000);
}
#if defined(__AVX512F__)
// Where the result is rounded to bfloat16: for every x to 3e-6, by the best polynomial of degree 4
// for the part of x above an integer. Of -infinity that part is 0.
template <int N>
FASTLM_INLINE void exp2(Vec (&x)[N], Pairs) {
  constexpr float kTerm[] = {1.342668889958377e-2f, 5.224246668681887e-2f, 2.412802083625480e-1f,
                             6.930448444245858e-1f, 1.f};
  Vec part[N], p[N];
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) asm("vreduceps $9, %1, %0" : "=v"(part[i]) : "v"(x[i]));
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) p[i] = part[i] * kTerm[0] + kTerm[1];
#pragma GCC unroll 4
  for (int t = 2; t < 5; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) p[i] = p[i] * part[i] + kTerm[t];
  }
  // times 2^floor(x)
#pragma GCC unroll 4
  for (int i = 0; i < N; ++i) asm("vscalefps %2, %1, %0" : "=v"(x[i]) : "v"(p[i]), "v"(x[i]));
}
#endif
template <class Unit = Singles>
FASTLM_INLINE Vec exp2(Vec x) {
  Vec one[1] = {x};
  exp2(one, Unit{});
  return one[0];
}

// the largest lane, in every lane
FASTLM_INLINE Vec spread_max(Vec x) {
#define FASTLM_SWAP(lane) ((lane) ^ kWidth)
  if constexpr (kLanes > 8) {
    constexpr int kWidth = kLanes > 8 ? 8 : 0;
    x = larger(FASTLM_SHUFFLE(VecBits, x, x, FASTLM_LANES(FASTLM_SWAP)), x);
  }
  if constexpr (kLanes > 4) {
    constexpr int kWidth = kLanes > 4 ? 4 : 0;
    x = larger(FASTLM_SHUFFLE(VecBits, x, x, FASTLM_LANES(FASTLM_SWAP)), x);
  }
  {
    constexpr int kWidth = 2;
    x = larger(FASTLM_SHUFFLE(VecBits, x, x, FASTLM_LANES(FASTLM_SWAP)), x);
  }
  {
    constexpr int kWidth = 1;
    x = larger(FASTLM_SHUFFLE(VecBits, x, x, FASTLM_LANES(FASTLM_SWAP)), x);
  }
#undef FASTLM_SWAP
  return x;
}

// a query of one head: its place in the sequence, and its keys [low, high), of the sequence too
struct Row {
  int64_t head, place;
  int64_t diagonal;
  int32_t low, high;
};

FASTLM_INLINE Row row_at(const Attention& a, const Sequence& s, int64_t head, int64_t place) {
  Row row{head, place, place + s.keys - s.rows, 0, 0};
  if (!s.attends) return row;
  int64_t low = 0, high = s.keys;
  if (a.left >= 0 && a.left < row.diagonal) low = row.diagonal - a.left;
  if (a.right >= 0 && a.right < high - row.diagonal - 1) high = row.diagonal + a.right + 1;
  if (a.lo) {
    const int64_t at =
        s.batch * a.limits_batch + head * a.limits_head + (s.first_row + place) * a.limits_row;
    low = most(low, int64_t(a.lo[at]) - s.first_key);
    high = least(high, int64_t(a.hi[at]) - s.first_key);
  }
  if (high > low) row.low = int32_t(low), row.high = int32_t(high);
  return row;
}

// the columns of a tile that rows attend to: a range for all of them, in whole panels
struct Columns {
  unsigned begin = kKeys, end = 0;
  bool full = true;  // every row takes every column

  void add(const Row& row, int64_t tile) {
    const int64_t low = most(0, row.low - tile), high = least(kKeys, row.high - tile);
    if (high <= low) {
      full = false;
      return;
    }
    begin = unsigned(least(begin, low / kPanel * kPanel));
    end = unsigned(most(end, up(high, kPanel)));
  }
  void finish(const Row* rows, int64_t count, int64_t tile) {
    for (int64_t i = 0; full && i < count; ++i)
      full = rows[i].low <= tile + begin && rows[i].high >= tile + end;
  }
  bool empty() const { return end <= begin; }
};
FASTLM_INLINE Columns columns_of(const Row* rows, int64_t count, int64_t tile) {
  Columns c;
  for (int64_t i = 0; i < count; ++i) c.add(rows[i], tile);
  c.finish(rows, count, tile);
  return c;
}

// the keys of a block of rows: [low, high) of some row, [full_low, full_high) of all
struct Block {
  int32_t low = INT32_MAX, high = 0, full_low = 0, full_high = INT32_MAX;

  void add(const Row& row) {
    full_low = int32_t(most(full_low, row.low));
    full_high = int32_t(least(full_high, row.high));
    if (row.high == 0) return;
    low = int32_t(least(low, row.low));
    high = int32_t(most(high, row.high));
  }
  // `rows` are looked at only where some attend to a key that others do not
  Columns columns(const Row* rows, int64_t count, int64_t tile) const {
    if (low >= tile + kKeys || high <= tile) {
      Columns none;
      none.full = false;
      return none;
    }
    if (full_low <= tile && full_high >= tile + kKeys) return {0, kKeys, true};
    return columns_of(rows, count, tile);
  }
};

// what the options add to one row, for its keys from `tile` on
struct Extras {
  const Attention& a;
  float slope, scale, inverse_cap;
  float offset;  // tile - diagonal
  int64_t bias_offset, keys_left;
  float keep[kKeys];  // of the dropout

  Extras(const Attention& a, const Sequence& s, const Row& row, int64_t tile, Columns c) : a(a) {
    scale = a.scale;
    inverse_cap = a.softcap > 0 ? 1.f / a.softcap : 0.f;
    slope = a.slopes ? a.slopes[s.batch * a.slopes_batch + row.head] : 0.f;
    offset = float(tile - row.diagonal);
    const int64_t key = s.first_key + tile;
    bias_offset = s.batch * a.bias_batch + row.head * a.bias_head +
                  (s.first_row + row.place) * a.bias_row + key * a.bias_key;
    keys_left = a.keys - key;
    if (a.dropout > 0) draw(s, row, key, c);
  }

  // element (b, h, i, j) takes word j % 4 of the draw with counter ((b H + h) Sq + i, j / 4)
  void draw(const Sequence& s, const Row& row, int64_t key, Columns c) {
    const uint64_t counter =
        uint64_t((s.batch * a.heads + row.head) * a.rows + s.first_row + row.place);
    const double limit = a.dropout * 4294967296.0;
    const float kept = a.dropout == 1 ? 0.f : float(1 / (1 - a.dropout));
    const int64_t end = key + c.end;
    for (int64_t quad = (key + c.begin) / 4; quad * 4 < end; ++quad) {
      const Philox words = philox(a.seed, counter, uint64_t(quad));
      for (int w = 0; w < 4; ++w) {
        const int64_t at = quad * 4 + w - key;
        if (at >= 0 && at < kKeys) keep[at] = double(words.word[w]) >= limit ? kept : 0.f;
      }
    }
  }

  Vec bias(unsigned column) const {
    const int64_t left = keys_left - column, at = bias_offset + column * a.bias_key;
    if (a.bias_type == Type::float32) return bias_from(static_cast<const float*>(a.bias), at, left);
    if (a.bias_type == Type::float16) return bias_from(static_cast<const Half*>(a.bias), at, left);
    return bias_from(static_cast<const BFloat16*>(a.bias), at, left);
  }
  template <typename T>
  Vec bias_from(const T* from, int64_t at, int64_t left) const {
    if (a.bias_key == 0) return broadcast(to_float(from[at]));
    if (left >= kLanes) return load(from + at);
    return left > 0 ? load_first(from + at, int(left), 0.f) : Vec{};
  }

  Vec distance(unsigned column) const {
    const Vec x = lanes() + (offset + float(column));
    return x < 0.f ? -x : x;
  }

  // the score of the product x less `shift`, in base 2: the difference first, which is of numbers
  // that are near each other. *slack: what the softcap takes from its gradient
  Vec score(Vec x, unsigned column, Vec* slack, float shift = 0.f) const {
    x = x * scale;
    if (a.softcap > 0) {
      const Vec u = x * inverse_cap;
      // 1 - tanh(u)^2 without the difference
      const Vec e = exp_in_range(at_least(-87.f, u < 0.f ? 2.f * u : -2.f * u));
      *slack = 4.f * e / ((1.f + e) * (1.f + e));
      x = a.softcap * tanh(u);
    }
    if (a.slopes) x = x - slope * distance(column);
    if (a.bias) x = x + bias(column);
    return (x - shift) * kLog2E;
  }
};

// lanes of a vector that starts at `column` within [low, high)
FASTLM_INLINE VecInt inside(unsigned column, int low, int high) {
  const VecInt at = lane_numbers() + int(column);
  return (at >= low) & (at < high);
}

// the halves of word k, along the sum, within [low, high)
template <class Unit>
FASTLM_INLINE uint32_t halves_inside(int64_t k, int64_t low, int64_t high) {
  if (Unit::kDepth == 1) return k >= low && k < high ? kBoth : kNone;
  return (2 * k >= low && 2 * k < high ? kLow : kNone) |
         (2 * k + 1 >= low && 2 * k + 1 < high ? kHigh : kNone);
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
