// Matrix product by blocks that fit the caches (Goto & van de Geijn 2008, "Anatomy of
// High-Performance Matrix Multiplication"): a panel of b stays in the first-level cache, a block of
// a and of b in the second.
//
// Every element of c is summed as matmul_chain.h says. So it depends on its row of a and its column
// of b alone, not on the number of threads or on what stands around it.
#include "common/vec.h"
#include "matmul/matmul.h"
#include "matmul/matmul_chain.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// a tile of c: 24 of 32 registers with AVX-512, 12 of 16 elsewhere
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kLanes;
constexpr int kDepth = kChain;
constexpr int kBlockRows = 10 * kRows;
constexpr int kBlockColumns = 1024;
// between the rows of a packed tile of a: rows 4 KiB apart would share the sets of the cache
constexpr int kRowStride = kDepth + 16;

FASTLM_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
FASTLM_INLINE int64_t up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// both packed
struct Blocks {
  float* a;  // tiles [kRows][kRowStride], or [depth][kRows] where a's columns are contiguous
  float* b;  // panels [depth][kColumns]
};

template <typename T>
FASTLM_INLINE const T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<const T*>(m.data) + row * m.row + column * m.column;
}

// sum[i][v] = sum over k of a[i][k] b[k][v]
template <int Rows, int RowStride, int DepthStride>
FASTLM_INLINE void multiply(const float* a, const float* b, int64_t depth,
                            Vec (&sum)[Rows][kVectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = Vec{};
  for (int64_t k = 0; k < depth; ++k, a += DepthStride, b += kColumns) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const Vec x = broadcast(a[i * RowStride]);
      sum[i][0] += x * b0;
      sum[i][1] += x * b1;
    }
  }
}

// where a tile of c stands
struct Tile {
  float* c;
  int64_t c_row;
  const float* bias;  // null: none, or not the first block of the depth
  bool add;
  int rows, columns;
};

template <int Rows>
FASTLM_INLINE void finish(const Tile& t, Vec (&sum)[Rows][kVectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) {
    if (i >= t.rows) break;
    float* c = t.c + i * t.c_row;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int left = t.columns - v * kLanes;
      if (left >= kLanes) {
        const Vec before = t.add    ? load(c + v * kLanes)
                           : t.bias ? load(t.bias + v * kLanes)
                                    : Vec{};
        store(c + v * kLanes, before + sum[i][v]);
      } else if (left > 0) {
        const float* from = t.add ? c : t.bias;
        const Vec before = from ? load_first(from + v * kLanes, left, 0.f) : Vec{};
        store_first(c + v * kLanes, before + sum[i][v], left);
      }
    }
  }
}

template <int Rows, int RowStride, int DepthStride>
void tile(const float* a, const float* b, int64_t depth, const Tile& t) {
  for (int i = 0; i < t.rows; ++i) {
    __builtin_prefetch(t.c + i * t.c_row, 1);
    __builtin_prefetch(t.c + i * t.c_row + kLanes, 1);
  }
  Vec sum[Rows][kVectors];
  multiply<Rows, RowStride, DepthStride>(a, b, depth, sum);
  finish(t, sum);
}

// the last rows of a block: two thirds or a third of a tile where that is enough
template <int RowStride, int DepthStride>
void tile_of(const float* a, const float* b, int64_t depth, const Tile& t) {
  if (t.rows <= kRows / 3) {
    tile<kRows / 3, RowStride, DepthStride>(a, b, depth, t);
  } else if (t.rows <= kRows * 2 / 3) {
    tile<kRows * 2 / 3, RowStride, DepthStride>(a, b, depth, t);
  } else {
    tile<kRows, RowStride, DepthStride>(a, b, depth, t);
  }
}

// rows[i][j] -> rows[j][i], for kLanes rows
FASTLM_INLINE void transpose(Vec (&rows)[kLanes]) {
  // each stage exchanges the off-diagonal blocks of all squares of 2 * width
#pragma GCC unroll 4
  for (int width = kLanes / 2; width > 0; width /= 2) {
    VecInt low, high;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      low[j] = j & width ? kLanes + j - width : j;
      high[j] = j & width ? kLanes + j : j + width;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & width) continue;
      const Vec first = rows[i], second = rows[i + width];
      rows[i] = __builtin_shuffle(first, second, low);
      rows[i + width] = __builtin_shuffle(first, second, high);
    }
  }
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

FASTLM_INLINE void pack(const MatmulArgs& s, int64_t m, int64_t k, int64_t rows, int64_t depth,
                        float* packed) {
  s.a.bfloat16 ? pack_a<BFloat16>(s.a, m, k, rows, depth, packed)
               : pack_a<float>(s.a, m, k, rows, depth, packed);
}

// part of c from (m, n) on, for one block of the depth
void block(const MatmulArgs& s, const Blocks& blocks, int64_t m, int64_t n, int64_t k, int64_t rows,
           int64_t columns, int64_t depth) {
  const bool columns_of_a = by_column(s.a);
  for (int64_t j = 0; j < columns; j += kColumns) {
    const float* b = blocks.b + j * depth;
    for (int64_t i = 0; i < rows; i += kRows) {
      const float* a = blocks.a + i * kRowStride;
      const Tile t{s.c + (m + i) * s.c_row + n + j,
                   s.c_row,
                   s.bias && k == 0 ? s.bias + n + j : nullptr,
                   s.accumulate || k > 0,
                   int(least(kRows, rows - i)),
                   int(least(kColumns, columns - j))};
      columns_of_a ? tile_of<1, kRows>(a, b, depth, t) : tile_of<kRowStride, 1>(a, b, depth, t);
    }
  }
}

struct Range {
  int64_t begin, end;
};
FASTLM_INLINE Range share(int64_t count, int64_t unit, int part, int parts) {
  const int64_t units = (count + unit - 1) / unit;
  return {least(count, units * part / parts * unit),
          least(count, units * (part + 1) / parts * unit)};
}

// members side by side along the rows of c: their parts should be near square, since what a member
// packs grows with the sides
int parts_of_rows(const MatmulArgs& s, int members) {
  int best = 1;
  double least_sides = 0;
  for (int parts = 1; parts <= members; ++parts) {
    if (members % parts) continue;
    const double sides = double(s.rows) / parts + double(s.columns) / (members / parts);
    if (parts == 1 || sides < least_sides) best = parts, least_sides = sides;
  }
  return best;
}

}  // namespace

int64_t matmul_workspace() {
  return int64_t(kBlockRows) * kRowStride + int64_t(kBlockColumns) * kDepth;
}

void matmul(const MatmulArgs& s, int rank, int members, float* workspace) {
  const Blocks blocks{workspace, workspace + int64_t(kBlockRows) * kRowStride};
  const int across = parts_of_rows(s, members);
  const Range rows = share(s.rows, kRows, rank % across, across);
  const Range columns = share(s.columns, kColumns, rank / across, members / across);
  for (int64_t n = columns.begin; n < columns.end; n += kBlockColumns) {
    const int64_t width = least(kBlockColumns, columns.end - n);
    for (int64_t k = 0; k < s.depth; k += kDepth) {
      const int64_t depth = least(kDepth, s.depth - k);
      s.b.bfloat16 ? pack_b<BFloat16>(s.b, k, n, depth, width, blocks.b)
                   : pack_b<float>(s.b, k, n, depth, width, blocks.b);
      for (int64_t m = rows.begin; m < rows.end; m += kBlockRows) {
        const int64_t height = least(kBlockRows, rows.end - m);
        pack(s, m, k, height, depth, blocks.a);
        block(s, blocks, m, n, k, height, width, depth);
      }
    }
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
