// Ends of rows and sums over lanes without a detour through memory: with few classes they are most
// of a row's time. The same values, and sums in the same order, as the functions of common/vec.h.
#pragma once

#include "common/vec.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define FASTLM_MASKED_ENDS
#include <immintrin.h>  // of inline functions it has those alone that never stand by themselves
#endif

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// lane i gets lane i + Width
template <int Width>
FASTLM_INLINE Vec moved_down(Vec x) {
#define FASTLM_FROM(lane) (((lane) + Width) % kLanes)
  return FASTLM_SHUFFLE(VecBits, x, x, FASTLM_LANES(FASTLM_FROM));
#undef FASTLM_FROM
}

// as reduce_add
FASTLM_INLINE float sum_of_lanes(Vec x) {
  if constexpr (kLanes > 8) x += moved_down<8>(x);
  if constexpr (kLanes > 4) x += moved_down<4>(x);
  x += moved_down<2>(x);
  x += moved_down<1>(x);
  return x[0];
}

// the largest lane of what holds no NaN
FASTLM_INLINE float largest_lane(Vec x) {
  if constexpr (kLanes > 8) x = max(x, moved_down<8>(x));
  if constexpr (kLanes > 4) x = max(x, moved_down<4>(x));
  x = max(x, moved_down<2>(x));
  x = max(x, moved_down<1>(x));
  return x[0];
}

// as load_first and store_first
#if defined(FASTLM_MASKED_ENDS)
// n may be any number above the lanes: a shift of so many is not defined
FASTLM_INLINE __mmask16 first_of(int n) { return __mmask16(n < kLanes ? (1u << n) - 1 : 0xffffu); }
FASTLM_INLINE Vec load_end(const float* p, int n, float fill) {
  return (Vec)_mm512_mask_loadu_ps((__m512)broadcast(fill), first_of(n), p);
}
FASTLM_INLINE Vec load_end(const BFloat16* p, int n, float fill) {
  const __mmask16 inside = first_of(n);
  VecHalf half = (VecHalf)_mm256_maskz_loadu_epi16(inside, p);
  Vec wide = (Vec)(__builtin_convertvector(half, VecBits) << 16);
  return (Vec)_mm512_mask_mov_ps((__m512)broadcast(fill), inside, (__m512)wide);
}
FASTLM_INLINE void store_end(float* p, Vec x, int n) {
  _mm512_mask_storeu_ps(p, first_of(n), (__m512)x);
}
FASTLM_INLINE void store_end(BFloat16* p, Vec x, int n) {
  BFloat16 rounded[kLanes];
  store(rounded, x);
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rounded));
  _mm256_mask_storeu_epi16(p, first_of(n), half);
}
#else
template <typename T>
FASTLM_INLINE Vec load_end(const T* p, int n, float fill) {
  return load_first(p, n, fill);
}
template <typename T>
FASTLM_INLINE void store_end(T* p, Vec x, int n) {
  store_first(p, x, n);
}
#endif

// as largest_of
template <typename T>
FASTLM_INLINE float largest_logit(const T* x, int count, float sign) {
  Vec m0 = broadcast(-kInfinity), m1 = m0, m2 = m0, m3 = m0;
  int i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    m0 = max(load(x + i) * sign, m0);
    m1 = max(load(x + i + kLanes) * sign, m1);
    m2 = max(load(x + i + 2 * kLanes) * sign, m2);
    m3 = max(load(x + i + 3 * kLanes) * sign, m3);
  }
  for (; i + kLanes <= count; i += kLanes) m0 = max(load(x + i) * sign, m0);
  if (i < count) m0 = max(load_end(x + i, count - i, -kInfinity * sign) * sign, m0);
  return largest_lane(max(max(m0, m1), max(m2, m3)));
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
