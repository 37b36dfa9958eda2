// The order in which an element of a product is summed, for the kernels whose results must be those
// of `matmul` to the bit: for each block of kChain words, one chain over k in order from 0; then
// ((start + chain 0) + chain 1) + ..., where the start is the bias, or 0. A word is a value, and a
// link of its chain a fused multiply-add; where pairs are multiplied (matmul_cpu.cpp) it is two
// bfloat16, and a link adds both products.
#pragma once

#include <cstdint>

namespace fastlm {

constexpr int64_t kChain = 128;

}  // namespace fastlm
