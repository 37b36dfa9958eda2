// How the blocks of both operands are packed for matmul_cpu.cpp. Include there only.
#pragma once

#include "common/bfloat16.h"
#include "matmul/matmul.h"
#include "matmul/matmul_chain.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// a tile of c: 24 of 32 registers with AVX-512, 12 of 16 elsewhere
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kLanes;
constexpr int kDepth = kChain;  // words: a float, or a pair of bfloat16
constexpr int kBlockRows = 10 * kRows;
constexpr int kBlockColumns = 1024;
// between the rows of a packed tile of a: rows 4 KiB apart would share the sets of the cache
constexpr int kRowStride = kDepth + 16;

FASTLM_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
FASTLM_INLINE int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// both packed, `depth` counted in words
struct Blocks {
  float* a;  // tiles [kRows][kRowStride], or [depth][kRows] where a's columns are contiguous
  float* b;  // panels [depth][kColumns]
};

template <typename T>
FASTLM_INLINE const T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row + column * m.column;
}

// b [depth, columns] from (k, n) on -> panels; columns past the end are 0
template <typename T>
void pack_b(const Matrix& b, int64_t k, int64_t n, int64_t depth, int64_t columns, float* packed) {
  if (b.column == 1) {
    for (int64_t i = 0; i < depth; ++i) {
      const T* from = at<T>(b, k + i, n);
      float* to = packed + i * kColumns;
      for (int64_t j = 0; j < columns; j += kColumns, to += kColumns * depth) {
        for (int v = 0; v < kColumns; v += kLanes) {
          const int64_t left = columns - j - v;
          if (left >= kLanes) {
            store(to + v, load(from + j + v));
          } else {
            store(to + v, left > 0 ? load_first(from + j + v, int(left), 0.f) : Vec{});
          }
        }
      }
    }
    return;
  }
  for (int64_t j = 0; j < columns; j += kLanes) {
    float* panel = packed + j / kColumns * kColumns * depth + j % kColumns;
    const int width = int(least(kLanes, columns - j));
    int64_t i = 0;
    if (b.row == 1) {
      for (; i + kLanes <= depth; i += kLanes) {
        const T* from = at<T>(b, k + i, n + j);
        Vec rows[kLanes];
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) rows[c] = c < width ? load(from + c * b.column) : Vec{};
        transpose(rows);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) store(panel + (i + c) * kColumns, rows[c]);
      }
    }
    for (; i < depth; ++i)
      for (int c = 0; c < kLanes; ++c)
        panel[i * kColumns + c] = c < width ? to_float(*at<T>(b, k + i, n + j + c)) : 0.f;
  }
  // the half of the last panel that no vector reached
  if (up(columns, kLanes) % kColumns) {
    float* panel = packed + columns / kColumns * kColumns * depth + kLanes;
    for (int64_t i = 0; i < depth; ++i) store(panel + i * kColumns, Vec{});
  }
}

FASTLM_INLINE bool by_column(const Matrix& a) { return a.row == 1 && a.column != 1; }

// a [rows, depth] from (m, k) on -> tiles; rows past the end are 0
template <typename T>
void pack_a(const Matrix& a, int64_t m, int64_t k, int64_t rows, int64_t depth, float* packed) {
  if (by_column(a)) {
    for (int64_t j = 0; j < depth; ++j) {
      const T* from = at<T>(a, m, k + j);
      float* to = packed + j * kRows;
      int64_t i = 0;
      for (; i + kRows <= rows; i += kRows, to += kRows * kRowStride) {
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) to[r] = to_float(from[i + r]);
      }
      if (i < rows)
        for (int r = 0; r < kRows; ++r) to[r] = i + r < rows ? to_float(from[i + r]) : 0.f;
    }
    return;
  }
  for (int64_t i = 0; i < up(rows, kRows); ++i) {
    float* to = packed + i * kRowStride;
    int64_t j = 0;
    if (i < rows && a.column == 1) {
      const T* from = at<T>(a, m + i, k);
      for (; j + kLanes <= depth; j += kLanes) store(to + j, load(from + j));
    }
    for (; j < depth; ++j) to[j] = i < rows ? to_float(*at<T>(a, m + i, k + j)) : 0.f;
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
