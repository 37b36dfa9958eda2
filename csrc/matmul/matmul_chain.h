// The order in which an element of a product is summed, for the kernels whose results must be those
// of `matmul` to the bit: for each block of kChain, one chain of fused multiply-adds over k in
// order from 0; then ((start + chain 0) + chain 1) + ..., where the start is the bias, or 0.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int64_t kChain = 128;

}  // namespace fastlm
