// bfloat16 in products: rounding, and words of two values that stand one after the other in the
// sum.
//
// A word holds value k of a sum in its low half and value k + 1 in its high half, which is what the
// AVX512_BF16 instructions read; shifted or masked it is each of them as a float. Words stand in
// arrays of float that nothing but this header looks into. Include in *_cpu.cpp only.
#pragma once

#include "common/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>  // of inline functions it has those alone that never stand by themselves
#endif

namespace {

// the nearest bfloat16; a NaN stays a NaN
FASTLM_INLINE Vec nearest_bfloat16(Vec x) {
  VecBits u = (VecBits)x;
  Vec near = (Vec)((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
  return x != x ? x : near;
}

// a float that counts as the nearest bfloat16
struct Rounded {
  float value;
};
FASTLM_INLINE float to_float(Rounded x) {
  BFloat16 near;
  from_float(x.value, &near);
  return to_float(near);
}
FASTLM_INLINE Vec load(const Rounded* p) { return nearest_bfloat16(load(&p->value)); }

FASTLM_INLINE uint16_t bits_of(BFloat16 x) { return x.bits; }
FASTLM_INLINE uint16_t bits_of(Rounded x) {
  BFloat16 near;
  from_float(x.value, &near);
  return near.bits;
}

// words of bfloat16 values, given as floats
FASTLM_INLINE Vec words(Vec low, Vec high) {
  return (Vec)(((VecBits)low >> 16) | ((VecBits)high & 0xffff0000u));
}
FASTLM_INLINE Vec low_of(Vec words) { return (Vec)((VecBits)words << 16); }
FASTLM_INLINE Vec high_of(Vec words) { return (Vec)((VecBits)words & 0xffff0000u); }
typedef uint32_t Word __attribute__((may_alias));
FASTLM_INLINE void store_word(float* p, uint16_t low, uint16_t high) {
  *reinterpret_cast<Word*>(p) = low | uint32_t(high) << 16;
}
// 2 kLanes values in a row, as words
typedef float VecOfHalves __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
FASTLM_INLINE Vec load_words(const BFloat16* p) { return *reinterpret_cast<const VecOfHalves*>(p); }
FASTLM_INLINE Vec broadcast_word(const float* p) {
  return (Vec)(VecBits{} + *reinterpret_cast<const Word*>(p));
}

#if defined(__AVX512BF16__)
// sum + low a * low b + high a * high b, in each lane; denormal numbers count as 0
FASTLM_INLINE Vec dot(Vec sum, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
FASTLM_INLINE Vec load_words(const Rounded* p) {
  return (Vec)_mm512_cvtne2ps_pbh((__m512)load(&p[kLanes].value), (__m512)load(&p->value));
}
#endif

}  // namespace
