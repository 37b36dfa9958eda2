// bfloat16 operands packed as words of two neighbours along the depth. Include in matmul_cpu.cpp
// only; the layouts are those of matmul_pack.h with words in the place of floats.
#pragma once

#include "matmul/matmul_pack.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// the words of values k and k + 1 of kLanes neighbours; `both` is false past the end of the depth
template <typename T>
FASTLM_INLINE Vec words_of(const T* k, const T* next, bool both) {
  return words(load(k), both ? load(next) : Vec{});
}
template <typename T>
FASTLM_INLINE Vec words_of_first(const T* k, const T* next, bool both, int count) {
  return words(load_first(k, count, 0.f), both ? load_first(next, count, 0.f) : Vec{});
}
template <typename T>
FASTLM_INLINE void put_word(float* to, const Matrix& m, int64_t row, int64_t column,
                            int64_t next_row, int64_t next_column, bool both) {
  store_word(to, bits_of(*at<T>(m, row, column)),
             both ? bits_of(*at<T>(m, next_row, next_column)) : 0);
}

// b [depth, columns] from (k, n) on, its rows contiguous
template <typename T>
void pack_b_rows(const Matrix& b, int64_t k, int64_t n, int64_t depth, int64_t columns,
                 float* packed) {
  const int64_t count = (depth + 1) / 2;
  for (int64_t i = 0; i < count; ++i) {
    const bool both = 2 * i + 1 < depth;
    const T* from = at<T>(b, k + 2 * i, n);
    const T* next = both ? from + b.row : from;
    float* to = packed + i * kColumns;
    for (int64_t j = 0; j < columns; j += kColumns, to += kColumns * count) {
      for (int v = 0; v < kColumns; v += kLanes) {
        const int64_t at = j + v, left = columns - at;
        store(to + v, left >= kLanes ? words_of(from + at, next + at, both)
                      : left > 0     ? words_of_first(from + at, next + at, both, int(left))
                                     : Vec{});
      }
    }
  }
}

// the same for any other strides
template <typename T>
void pack_b_columns(const Matrix& b, int64_t k, int64_t n, int64_t depth, int64_t columns,
                    float* packed) {
  const int64_t count = (depth + 1) / 2;
  for (int64_t j = 0; j < up(columns, kColumns); j += kLanes) {
    float* panel = packed + j / kColumns * kColumns * count + j % kColumns;
    const int width = int(least(kLanes, columns - j));  // may be negative
    int64_t i = 0;
    if (b.row == 1) {
      for (; 2 * (i + kLanes) <= depth; i += kLanes) {
        const T* from = at<T>(b, k + 2 * i, n + j);
        Vec rows[kLanes];
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c)
          rows[c] = c < width ? load_words(from + c * b.column) : Vec{};
        transpose(rows);
#pragma GCC unroll 16
        for (int c = 0; c < kLanes; ++c) store(panel + (i + c) * kColumns, rows[c]);
      }
    }
    for (; i < count; ++i) {
      const int64_t row = k + 2 * i;
      store(panel + i * kColumns, Vec{});
      for (int c = 0; c < width; ++c)
        put_word<T>(panel + i * kColumns + c, b, row, n + j + c, row + 1, n + j + c,
                    2 * i + 1 < depth);
    }
  }
}

template <typename T>
void pack_b_pairs(const Matrix& b, int64_t k, int64_t n, int64_t depth, int64_t columns,
                  float* packed) {
  b.column == 1 ? pack_b_rows<T>(b, k, n, depth, columns, packed)
                : pack_b_columns<T>(b, k, n, depth, columns, packed);
}

// a [rows, depth] from (m, k) on, its columns contiguous
template <typename T>
void pack_a_columns(const Matrix& a, int64_t m, int64_t k, int64_t rows, int64_t depth,
                    float* packed) {
  for (int64_t j = 0; 2 * j < depth; ++j) {
    const bool both = 2 * j + 1 < depth;
    const T* from = at<T>(a, m, k + 2 * j);
    const T* next = both ? from + a.column : from;
    float* to = packed + j * kRows;
    for (int64_t i = 0; i < rows; i += kRows, to += kRows * kRowStride) {
      // what is written past the tile is the next word's, or between the tiles
      store(to, i + kLanes <= rows
                    ? words_of(from + i, next + i, both)
                    : words_of_first(from + i, next + i, both, int(least(kLanes, rows - i))));
    }
  }
}

template <typename T>
void pack_a_pairs(const Matrix& a, int64_t m, int64_t k, int64_t rows, int64_t depth,
                  float* packed) {
  static_assert(kRows <= kLanes && (kRowStride - kDepth) * kRows >= kLanes - kRows, "room");
  if (by_column(a)) return pack_a_columns<T>(a, m, k, rows, depth, packed);
  const int64_t count = (depth + 1) / 2;
  for (int64_t i = 0; i < up(rows, kRows); ++i) {
    float* to = packed + i * kRowStride;
    int64_t j = 0;
    if (i < rows && a.column == 1) {
      const T* from = at<T>(a, m + i, k);
      for (; 2 * (j + kLanes) <= depth; j += kLanes) store(to + j, load_words(from + 2 * j));
    }
    for (; j < count; ++j) {
      if (i < rows) {
        const int64_t column = k + 2 * j;
        put_word<T>(to + j, a, m + i, column, m + i, column + 1, 2 * j + 1 < depth);
      } else {
        to[j] = 0.f;
      }
    }
  }
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
