// Panels, and products of them that stay in registers.
//
// A matrix of words stands in panels of kPanel columns, [columns / kPanel][rows][kPanel]. The left
// operand of a product is read from such panels by row or by column, the right one row by row.
// A word is a float or, with `Pairs`, two bfloat16 that follow each other along the sum.
#pragma once

#include "attention/attention.h"
#include "common/vec.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// a tile of sums: 24 of 32 registers with AVX-512, 12 of 16 elsewhere
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kPanel = 2 * kLanes;

FASTLM_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
FASTLM_INLINE int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
FASTLM_INLINE int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// which of the two halves of a word take part in a sum
enum Halves : uint32_t { kNone = 0, kLow = 0x0000ffffu, kHigh = 0xffff0000u, kBoth = ~0u };

struct Singles {
  static constexpr int kDepth = 1;
  FASTLM_INLINE void add(Vec& sum, Vec x, Vec y) { sum += x * y; }
};
#if defined(__AVX512F__)
struct Pairs {
  static constexpr int kDepth = 2;
  // by name, since this compilation must not use AVX512_BF16 anywhere else
  FASTLM_INLINE void add(Vec& sum, Vec x, Vec y) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  }
};
#endif

struct Product {
  const float* a;
  int64_t a_panel;      // between the panels of a
  const float* b;       // one panel
  int64_t begin, end;   // of the sum, in words
  float* c;             // one panel
  const float* factor;  // of each row, for Finish::scale
};
// the next `count` floats of a workspace
FASTLM_INLINE float* take(float** from, int64_t count) {
  float* taken = *from;
  *from += up(count, 16);
  return taken;
}

// sum += over k of a[i][k] b[k]
template <class Unit, bool kByColumn, int Rows>
FASTLM_INLINE void accumulate(const Product& p, Vec (&sum)[Rows][2]) {
  constexpr int kRowStride = kByColumn ? 1 : kPanel, kStep = kByColumn ? kPanel : 1;
  const float* b = p.b + p.begin * kPanel;
  for (int64_t k = p.begin; k < p.end;) {
    const int64_t inside = kByColumn ? 0 : k % kPanel;
    const int64_t stop = kByColumn ? p.end : least(p.end, k - inside + kPanel);
    const float* a = kByColumn ? p.a + k * kPanel : p.a + k / kPanel * p.a_panel + inside;
    for (; k < stop; ++k, a += kStep, b += kPanel) {
      const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const Vec x = broadcast(a[i * kRowStride]);
        Unit::add(sum[i][0], b0, x);
        Unit::add(sum[i][1], b1, x);
      }
    }
  }
}

// Two products by row, of half the registers each: together they hide the latency that one alone
// would wait for.
template <class Unit, int Rows>
FASTLM_INLINE void accumulate_both(const Product& p, const Product& q, Vec (&x)[Rows][2],
                                   Vec (&y)[Rows][2]) {
  const int64_t both = least(p.end, q.end);
  const float *p_b = p.b, *q_b = q.b;
  for (int64_t k = 0; k < both;) {
    const float *p_a = p.a + k / kPanel * p.a_panel, *q_a = q.a + k / kPanel * q.a_panel;
    const int64_t stop = least(both, k + kPanel);
    for (; k < stop; ++k, ++p_a, ++q_a, p_b += kPanel, q_b += kPanel) {
      const Vec p0 = load(p_b), p1 = load(p_b + kLanes), q0 = load(q_b), q1 = load(q_b + kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < Rows; ++i) {
        const Vec a = broadcast(p_a[i * kPanel]), b = broadcast(q_a[i * kPanel]);
        Unit::add(x[i][0], p0, a);
        Unit::add(x[i][1], p1, a);
        Unit::add(y[i][0], q0, b);
        Unit::add(y[i][1], q1, b);
      }
    }
  }
  Product rest = p.end > both ? p : q;
  rest.begin = both;
  if (p.end > both) accumulate<Unit, false>(rest, x);
  if (q.end > both) accumulate<Unit, false>(rest, y);
}

enum class Finish { store, add, scale };

// c = sum over k of a[i][k] b[k]; c + that; factor[i] c + that
template <class Unit, Finish kFinish, bool kByColumn, int Rows>
__attribute__((noinline)) void multiply(const Product& p) {
  if constexpr (kFinish != Finish::store) {
    for (int i = 0; i < Rows; ++i) {
      __builtin_prefetch(p.c + i * kPanel, 1);
      __builtin_prefetch(p.c + i * kPanel + kLanes, 1);
    }
  }
  Vec sum[Rows][2];
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = Vec{};
  accumulate<Unit, kByColumn>(p, sum);
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    float* c = p.c + i * kPanel;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v, c += kLanes) {
      if constexpr (kFinish == Finish::store) store(c, sum[i][v]);
      if constexpr (kFinish == Finish::add) store(c, load(c) + sum[i][v]);
      if constexpr (kFinish == Finish::scale) store(c, load(c) * p.factor[i] + sum[i][v]);
    }
  }
}

// for 1 to kRows rows; writes up to kRows
template <class Unit, Finish kFinish, bool kByColumn = false>
FASTLM_INLINE void multiply_rows(const Product& p, int64_t rows) {
  if (rows <= kRows / 3) {
    multiply<Unit, kFinish, kByColumn, kRows / 3>(p);
  } else if (rows <= kRows * 2 / 3) {
    multiply<Unit, kFinish, kByColumn, kRows * 2 / 3>(p);
  } else {
    multiply<Unit, kFinish, kByColumn, kRows>(p);
  }
}

// As `multiply` of one row, to the same bits, but words (or halves) of b that `halves(k)` leaves
// out are not touched: what is NaN there stays out of the sum.
template <class Unit, Finish kFinish, bool kByColumn, class Chosen>
__attribute__((noinline)) void multiply_chosen(const Product& p, int64_t row,
                                               const Chosen& halves) {
  Vec sum[2] = {};
  for (int64_t k = p.begin; k < p.end; ++k) {
    const uint32_t which = halves(k);
    if (which == kNone) continue;
    const float a =
        kByColumn ? p.a[k * kPanel + row] : p.a[k / kPanel * p.a_panel + row * kPanel + k % kPanel];
    for (int v = 0; v < 2; ++v) {
      const Vec b = load(p.b + k * kPanel + v * kLanes);
      Unit::add(sum[v], (Vec)((VecBits)b & which), broadcast(a));
    }
  }
  for (int v = 0; v < 2; ++v) {
    float* c = p.c + row * kPanel + v * kLanes;
    const Vec before = kFinish == Finish::store ? Vec{}
                       : kFinish == Finish::add ? load(c)
                                                : load(c) * p.factor[row];
    store(c, before + sum[v]);
  }
}

// ---- float16

using ::from_float;
using ::load;
using ::store;
using ::to_float;

struct Half {
  uint16_t bits;
};
FASTLM_INLINE Vec half_to_float(VecBits h) {
  const VecBits magnitude = h & 0x7fff;
  // 2^112 moves the exponent; subnormal numbers come out right too
  const Vec scaled = (Vec)(magnitude << 13) * 5.192296858534828e33f;
  const VecBits bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : (VecBits)scaled;
  return (Vec)(bits | ((h & 0x8000) << 16));
}
// round to nearest even; a NaN stays a NaN
FASTLM_INLINE VecBits float_to_half(Vec x) {
  const VecBits u = (VecBits)x, sign = u & 0x80000000u, a = u ^ sign;
  const VecBits normal = (a + 0xc8000fffu + ((a >> 13) & 1)) >> 13;
  // adding 1/2 leaves a subnormal number in the low bits
  const VecBits small = (VecBits)((Vec)a + 0.5f) - 0x3f000000u;
  const VecBits huge = a > 0x7f800000u ? VecBits{} + 0x7e00u : VecBits{} + 0x7c00u;
  const VecBits magnitude = a >= 0x47800000u ? huge : a < 0x38800000u ? small : normal;
  return magnitude | (sign >> 16);
}
FASTLM_INLINE Vec load(const Half* p) {
  const VecHalf half = *reinterpret_cast<const VecHalfUnaligned*>(p);
  return half_to_float(__builtin_convertvector(half, VecBits));
}
FASTLM_INLINE float to_float(Half x) { return half_to_float(VecBits{} + x.bits)[0]; }
FASTLM_INLINE void store(Half* p, Vec x) {
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(float_to_half(x), VecHalf);
}
FASTLM_INLINE void from_float(float x, Half* out) {
  out->bits = uint16_t(float_to_half(broadcast(x))[0]);
}

// ---- from rows of a tensor to panels

template <typename T>
FASTLM_INLINE const T* row_of(const Heads& h, int64_t batch, int64_t row, int64_t head) {
  return static_cast<const T*>(h.data) + batch * h.batch + row * h.row + head * h.head;
}

// the words of one row of a tensor, from word c on; 0 behind the last of `words`
struct WordsOf {
  template <typename T>
  FASTLM_INLINE Vec take(const T* row, int64_t c, int64_t size, Singles) {
    if (c + kLanes <= size) return load(row + c);
    return c < size ? load_first(row + c, int(size - c), 0.f) : Vec{};
  }
#if defined(__AVX512F__)
  FASTLM_INLINE Vec take(const BFloat16* row, int64_t c, int64_t size, Pairs) {
    if (2 * (c + kLanes) <= size) return load(reinterpret_cast<const float*>(row + 2 * c));
    uint32_t words[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      if (2 * (c + i) < size) words[i] = row[2 * (c + i)].bits;
      if (2 * (c + i) + 1 < size) words[i] |= uint32_t(row[2 * (c + i) + 1].bits) << 16;
    }
    return load(reinterpret_cast<const float*>(words));
  }
#endif
};

// lanes that hold infinity or NaN are not 0
FASTLM_INLINE VecInt not_finite(Vec x, Singles) { return x - x != 0.f; }
#if defined(__AVX512F__)
FASTLM_INLINE VecInt not_finite(Vec x, Pairs) {
  const VecBits w = (VecBits)x;
  return ((w & 0x7f80u) == 0x7f80u) | ((w & 0x7f800000u) == 0x7f800000u);
}
#endif
FASTLM_INLINE bool any(VecInt x) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= x[i];
  return found != 0;
}

// where rows come from: one head of one sequence
template <typename T>
struct Source {
  const T* data;
  int64_t stride, rows, size;
};
template <typename T>
FASTLM_INLINE Source<T> source(const Heads& h, int64_t batch, int64_t row, int64_t head,
                               int64_t rows, int64_t size) {
  return {row_of<T>(h, batch, row, head), h.row, rows, size};
}

// all of its rows into the second-level cache, side by side instead of as they are needed
template <typename T>
FASTLM_INLINE void prefetch_rows(const Source<T>& s) {
  for (int64_t r = 0; r < s.rows; ++r)
    for (int64_t c = 0; c < s.size; c += int64_t(64 / sizeof(T)))
      __builtin_prefetch(s.data + r * s.stride + c, 0, 2);
}

template <class Unit>
FASTLM_INLINE int64_t words(int64_t size) {
  return (size + Unit::kDepth - 1) / Unit::kDepth;
}

// rows as panels of words along the row; whether all is finite
template <class Unit, typename T>
bool pack_rows(const Source<T>& s, float* to, int64_t panel) {
  VecInt bad{};
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t c = 0; c < up(words<Unit>(s.size), kLanes); c += kLanes) {
      const Vec x = WordsOf::take(s.data + r * s.stride, c, s.size, Unit{});
      bad |= not_finite(x, Unit{});
      store(to + c / kPanel * panel + r * kPanel + c % kPanel, x);
    }
  }
  return !any(bad);
}

// rows become columns: [rows / kPanel][words][kPanel]; columns behind the last row are 0
template <class Unit, typename T>
void pack_transposed(const Source<T>& s, float* to) {
  const int64_t depth = words<Unit>(s.size);
  for (int64_t r = 0; r < up(s.rows, kPanel); r += kLanes) {
    float* panel = to + r / kPanel * depth * kPanel + r % kPanel;
    for (int64_t c = 0; c < depth; c += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] =
            r + i < s.rows ? WordsOf::take(s.data + (r + i) * s.stride, c, s.size, Unit{}) : Vec{};
      }
      transpose(block);
      for (int i = 0; i < least(kLanes, depth - c); ++i) store(panel + (c + i) * kPanel, block[i]);
    }
  }
}

// rows as panels of words across rows, the right operand of a sum over rows
template <class Unit, typename T>
struct PackAcross {
  static bool run(const Source<T>& s, float* to, int64_t panel) {
    return pack_rows<Unit>(s, to, panel);
  }
};
#if defined(__AVX512F__)
FASTLM_INLINE VecBits halves_of(const BFloat16* p, int64_t left) {
  if (left >= kLanes)
    return __builtin_convertvector(*reinterpret_cast<const VecHalfUnaligned*>(p), VecBits);
  VecBits x{};
  for (int64_t i = 0; i < left; ++i) x[i] = p[i].bits;
  return x;
}
template <>
struct PackAcross<Pairs, BFloat16> {
  static bool run(const Source<BFloat16>& s, float* to, int64_t panel) {
    VecInt bad{};
    for (int64_t r = 0; r < s.rows; r += 2) {
      const BFloat16* row = s.data + r * s.stride;
      for (int64_t c = 0; c < s.size; c += kLanes) {
        VecBits x = halves_of(row + c, s.size - c);
        if (r + 1 < s.rows) x |= halves_of(row + s.stride + c, s.size - c) << 16;
        bad |= not_finite((Vec)x, Pairs{});
        store(to + c / kPanel * panel + r / 2 * kPanel + c % kPanel, (Vec)x);
      }
    }
    return !any(bad);
  }
};

// 32 floats in order as 16 words, and columns of two rows as words; rounded to nearest even
FASTLM_INLINE Vec pack_along(Vec first, Vec second) {
  Vec out;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(out) : "v"(second), "v"(first));
  return out;
}
FASTLM_INLINE Vec pack_across(Vec above, Vec below) {
  typedef uint16_t Halves32 __attribute__((vector_size(64), may_alias));
  const Halves32 x = (Halves32)pack_along(above, below);
  return (Vec)FASTLM_SHUFFLE(Halves32, x, x, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

// a row of sums in panels, times `factor`, to `size` elements of a tensor
template <typename T>
FASTLM_INLINE void write_row(const float* from, int64_t panel, float factor, T* to, int64_t size) {
  for (int64_t c = 0; c < size; c += kLanes) {
    const Vec x = load(from + c / kPanel * panel + c % kPanel) * factor;
    if (c + kLanes <= size) {
      store(to + c, x);
    } else {
      store_first(to + c, x, int(size - c));
    }
  }
}

// the element type of a tensor and the unit of the products made of it
template <typename T, class U>
struct Kind {
  using Element = T;
  using Unit = U;
};

// body(Kind) for the kind of these tensors
template <class Body>
FASTLM_INLINE void with_kind(const Attention& a, const Body& body) {
  if (a.type == Type::float32) return body(Kind<float, Singles>{});
  if (a.type == Type::float16) return body(Kind<Half, Singles>{});
#if defined(__AVX512F__)
  if (a.pairs) return body(Kind<BFloat16, Pairs>{});
#endif
  body(Kind<BFloat16, Singles>{});
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
