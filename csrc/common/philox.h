// Philox-4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as
// easy as 1, 2, 3"): a draw is a function of (key, counter), so it needs no state and no order.
//
// The functions are static so that each instruction set keeps its own copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTLM_HOST_DEVICE __host__ __device__
#else
#define FASTLM_HOST_DEVICE
#endif

namespace fastlm {

struct Philox {
  uint32_t word[4];
};

FASTLM_HOST_DEVICE static inline Philox philox(uint64_t key, uint64_t low, uint64_t high) {
  constexpr uint32_t kMultiply0 = 0xD2511F53, kMultiply1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  uint32_t c0 = uint32_t(low), c1 = uint32_t(low >> 32);
  uint32_t c2 = uint32_t(high), c3 = uint32_t(high >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = uint64_t(kMultiply0) * c0, p1 = uint64_t(kMultiply1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key1;
    c3 = uint32_t(p0);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1) in steps of 2^-53, from the first two words
FASTLM_HOST_DEVICE static inline double philox_double(const Philox& draw) {
  uint64_t bits = (uint64_t(draw.word[0]) << 21) | (draw.word[1] >> 11);
  return double(bits) * (1.0 / 9007199254740992.0);
}

}  // namespace fastlm
