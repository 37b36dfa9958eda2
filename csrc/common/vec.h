// Vectors of float for the CPU kernels, as wide as the instruction set of this compilation.
//
// Written with the vector extensions of GCC and clang, so one source serves AVX-512, AVX2, SSE and
// NEON. Include it in *_cpu.cpp only, and include nothing else there but <cstdint>: an inline
// function of the standard library compiled here with AVX could be the copy the linker keeps for
// the whole process.
#pragma once

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2), may_alias));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t VecHalfUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};

#define FASTLM_INLINE static inline __attribute__((always_inline))

FASTLM_INLINE Vec broadcast(float x) { return x - Vec{}; }

FASTLM_INLINE float to_float(float x) { return x; }
FASTLM_INLINE float to_float(BFloat16 x) {
  union {
    uint32_t u;
    float f;
  } v{uint32_t(x.bits) << 16};
  return v.f;
}
FASTLM_INLINE void from_float(float x, float* out) { *out = x; }
// round to nearest even; a NaN stays a NaN
FASTLM_INLINE void from_float(float x, BFloat16* out) {
  union {
    float f;
    uint32_t u;
  } v{x};
  out->bits = x != x ? 0x7fc0 : uint16_t((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}

FASTLM_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
FASTLM_INLINE Vec load(const BFloat16* p) {
  VecHalf half = *reinterpret_cast<const VecHalfUnaligned*>(p);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}
FASTLM_INLINE void store(float* p, Vec x) { *reinterpret_cast<VecUnaligned*>(p) = x; }
FASTLM_INLINE void store(BFloat16* p, Vec x) {
  VecBits u = (VecBits)x;
  VecBits rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VecBits bits = x != x ? VecBits{} + 0x7fc0 : rounded;
  *reinterpret_cast<VecHalfUnaligned*>(p) = __builtin_convertvector(bits, VecHalf);
}

// lanes of a and b by constant numbers, which `Mask` holds; the name before GCC 12 is another one
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define FASTLM_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef FASTLM_SHUFFLE
#define FASTLM_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

// blocks of `size` lanes taken in turn: the even ones of a and of b, or the odd ones
#if defined(__AVX512F__)
#define FASTLM_LANES(m)                                                                          \
  m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7), m(8), m(9), m(10), m(11), m(12), m(13), m(14), \
      m(15)
#elif defined(__AVX2__)
#define FASTLM_LANES(m) m(0), m(1), m(2), m(3), m(4), m(5), m(6), m(7)
#else
#define FASTLM_LANES(m) m(0), m(1), m(2), m(3)
#endif
template <int Size>
FASTLM_INLINE void exchange_blocks(Vec& a, Vec& b) {
#define FASTLM_EVEN(lane) ((lane) & Size ? (lane) - Size + kLanes : (lane))
#define FASTLM_ODD(lane) ((lane) & Size ? (lane) + kLanes : (lane) + Size)
  Vec even = FASTLM_SHUFFLE(VecBits, a, b, FASTLM_LANES(FASTLM_EVEN));
  b = FASTLM_SHUFFLE(VecBits, a, b, FASTLM_LANES(FASTLM_ODD));
  a = even;
#undef FASTLM_EVEN
#undef FASTLM_ODD
}
template <int Size>
FASTLM_INLINE void exchange_all(Vec (&block)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & Size)) exchange_blocks<Size>(block[i], block[i + Size]);
}
// block[i][j] <-> block[j][i]
FASTLM_INLINE void transpose(Vec (&block)[kLanes]) {
  exchange_all<1>(block);
  exchange_all<2>(block);
  if constexpr (kLanes > 4) exchange_all<4>(block);
  if constexpr (kLanes > 8) exchange_all<8>(block);
}

// the first n < kLanes elements; the others read as `fill`
template <typename T>
FASTLM_INLINE Vec load_first(const T* p, int n, float fill) {
  float buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}
template <typename T>
FASTLM_INLINE void store_first(T* p, Vec x, int n) {
  float buffer[kLanes];
  store(buffer, x);
  for (int i = 0; i < n; ++i) from_float(buffer[i], p + i);
}

// fixed order, so that a sum does not depend on where it ran
FASTLM_INLINE float reduce_add(Vec x) {
  float b[kLanes];
  store(b, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) b[i] += b[i + width];
  return b[0];
}
// NaN in any lane gives NaN
FASTLM_INLINE float reduce_max(Vec x) {
  float b[kLanes];
  store(b, x);
  float m = b[0];
  for (int i = 1; i < kLanes; ++i) m = (b[i] > m || b[i] != b[i]) ? b[i] : m;
  return m;
}
// x as it is rounded: what follows must not be fused with the product that made it
FASTLM_INLINE Vec rounded(Vec x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

FASTLM_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
FASTLM_INLINE Vec select(VecInt mask, Vec a, Vec b) { return mask ? a : b; }

constexpr float kInfinity = __builtin_inff();

// largest of x * sign; NaN is passed over
template <typename T>
FASTLM_INLINE float largest_of(const T* x, int64_t count, float sign) {
  Vec m0 = broadcast(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    m0 = max(load(x + i) * sign, m0);
    m1 = max(load(x + i + kLanes) * sign, m1);
    m2 = max(load(x + i + 2 * kLanes) * sign, m2);
    m3 = max(load(x + i + 3 * kLanes) * sign, m3);
  }
  for (; i + kLanes <= count; i += kLanes) m0 = max(load(x + i) * sign, m0);
  if (i < count) m0 = max(load_first(x + i, int(count - i), -kInfinity * sign) * sign, m0);
  return reduce_max(max(max(m0, m1), max(m2, m3)));
}

// the larger and the smaller, one instruction each; a NaN in `x` stays
FASTLM_INLINE Vec at_least(float low, Vec x) {
  Vec bound = broadcast(low);
  return bound > x ? bound : x;
}
FASTLM_INLINE Vec at_most(float high, Vec x) {
  Vec bound = broadcast(high);
  return bound < x ? bound : x;
}

// exp for x in [-87.3, 88] within 2 ulp: 2^n * p(r) with the Cephes polynomial (S. Moshier).
// NaN stays NaN.
FASTLM_INLINE Vec exp_in_range(Vec x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec shifted = x * 1.44269504088896341f + kMagic;
  Vec n = shifted - kMagic;
  Vec r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.f);
  // the integer stands in the low bits of `shifted`; 0x3f800000 is 1.0
  VecBits scale = ((VecBits)shifted << 23) + 0x3f800000;
  return p * (Vec)scale;
}
// exp of what is at most 88: 0 below -87.3, NaN stays NaN
FASTLM_INLINE Vec exp(Vec x) {
  Vec y = exp_in_range(at_least(-87.3f, x));
  return x < -87.3f ? Vec{} : y;
}
// log(1 + x) for finite x > -1 within 2 ulp, NaN stays NaN: the Cephes polynomial of log
// (S. Moshier) at x itself where 1 + x is near 1.
FASTLM_INLINE Vec log1p(Vec x) {
  Vec y = 1.f + x;
  // y = m 2^e with m in [sqrt(1/2), sqrt(2))
  VecInt e = ((VecInt)y - 0x3f3504f3) >> 23;
  Vec f = select(e == 0, x, (Vec)((VecInt)y - (e << 23)) - 1.f);
  Vec exponent = __builtin_convertvector(e, Vec);
  Vec p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  Vec square = f * f;
  p = p * f * square - exponent * 2.12194440e-4f - 0.5f * square;
  p = f + p + exponent * 0.693359375f;
  return x != x ? x : p;
}
FASTLM_INLINE Vec sigmoid(Vec x) {
  return 1.f / (1.f + exp_in_range(at_most(87.f, at_least(-87.f, -x))));
}
// near 0 the exponential form loses its relative accuracy; Cephes polynomial there (S. Moshier)
FASTLM_INLINE Vec tanh(Vec x) {
  Vec square = x * x;
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  p = p * square * x + x;
  // of |x|: for negative x the difference would be of numbers twice the result
  VecBits sign = (VecBits)x & 0x80000000u;
  Vec t = exp_in_range(at_least(-87.f, -2.f * (Vec)((VecBits)x ^ sign)));
  Vec far = 1.f - 2.f * t / (1.f + t);
  return square < 0.390625f ? p : (Vec)((VecBits)far | sign);
}

}  // namespace
