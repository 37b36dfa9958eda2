// Matrix product by blocks that fit the caches (Goto & van de Geijn 2008, "Anatomy of
// High-Performance Matrix Multiplication"): a panel of b stays in the first-level cache, a block of
// a and of b in the second.
//
// Every element of c is summed as matmul_chain.h says. So it depends on its row of a and its column
// of b alone, not on the number of threads or on what stands around it.
//
// With AVX512_BF16 a word is a pair of bfloat16, where both operands are that or are to be rounded,
// and a step of the chain adds the products of a pair: twice the rate of float32. Elsewhere they
// are widened.
#include "matmul/matmul_pack.h"
#if defined(__AVX512BF16__)
#include "matmul/matmul_pairs.h"
#endif

namespace fastlm {
namespace FASTLM_ISA {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

template <bool Pairs>
FASTLM_INLINE Vec add_product(Vec sum, Vec a, Vec b) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs) return dot(sum, a, b);
#endif
  return sum + a * b;
}

// sum[i][v] = sum over k of a[i][k] b[k][v]
template <int Rows, int RowStride, int DepthStride, bool Pairs>
FASTLM_INLINE void multiply(const float* a, const float* b, int64_t depth,
                            Vec (&sum)[Rows][kVectors]) {
#pragma GCC unroll 12
  for (int i = 0; i < Rows; ++i) sum[i][0] = sum[i][1] = Vec{};
  for (int64_t k = 0; k < depth; ++k, a += DepthStride, b += kColumns) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < Rows; ++i) {
      const Vec x = broadcast_word(a + i * RowStride);
      sum[i][0] = add_product<Pairs>(sum[i][0], x, b0);
      sum[i][1] = add_product<Pairs>(sum[i][1], x, b1);
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

template <int Rows, int RowStride, int DepthStride, bool Pairs>
void tile(const float* a, const float* b, int64_t depth, const Tile& t) {
  for (int i = 0; i < t.rows; ++i) {
    __builtin_prefetch(t.c + i * t.c_row, 1);
    __builtin_prefetch(t.c + i * t.c_row + kLanes, 1);
  }
  Vec sum[Rows][kVectors];
  multiply<Rows, RowStride, DepthStride, Pairs>(a, b, depth, sum);
  finish(t, sum);
}

// the last rows of a block: two thirds or a third of a tile where that is enough
template <int RowStride, int DepthStride, bool Pairs>
void tile_of(const float* a, const float* b, int64_t depth, const Tile& t) {
  if (t.rows <= kRows / 3) {
    tile<kRows / 3, RowStride, DepthStride, Pairs>(a, b, depth, t);
  } else if (t.rows <= kRows * 2 / 3) {
    tile<kRows * 2 / 3, RowStride, DepthStride, Pairs>(a, b, depth, t);
  } else {
    tile<kRows, RowStride, DepthStride, Pairs>(a, b, depth, t);
  }
}

enum class Kind { floats, bfloat16, rounded };
FASTLM_INLINE Kind kind_of(const Matrix& m, bool round) {
  return m.bfloat16 ? Kind::bfloat16 : round ? Kind::rounded : Kind::floats;
}

// element types of a, b
template <bool Pairs>
void pack_a_of(const MatmulArgs& s, int64_t m, int64_t k, int64_t rows, int64_t depth, float* to) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs)
    return s.a.bfloat16 ? pack_a_pairs<BFloat16>(s.a, m, k, rows, depth, to)
                        : pack_a_pairs<Rounded>(s.a, m, k, rows, depth, to);
#endif
  const Kind kind = kind_of(s.a, s.round);
  kind == Kind::bfloat16  ? pack_a<BFloat16>(s.a, m, k, rows, depth, to)
  : kind == Kind::rounded ? pack_a<Rounded>(s.a, m, k, rows, depth, to)
                          : pack_a<float>(s.a, m, k, rows, depth, to);
}
template <bool Pairs>
void pack_b_of(const MatmulArgs& s, int64_t k, int64_t n, int64_t depth, int64_t columns,
               float* to) {
#if defined(__AVX512BF16__)
  if constexpr (Pairs)
    return s.b.bfloat16 ? pack_b_pairs<BFloat16>(s.b, k, n, depth, columns, to)
                        : pack_b_pairs<Rounded>(s.b, k, n, depth, columns, to);
#endif
  const Kind kind = kind_of(s.b, s.round);
  kind == Kind::bfloat16  ? pack_b<BFloat16>(s.b, k, n, depth, columns, to)
  : kind == Kind::rounded ? pack_b<Rounded>(s.b, k, n, depth, columns, to)
                          : pack_b<float>(s.b, k, n, depth, columns, to);
}

// part of c from (m, n) on, for one block of the depth; `words` of it
template <bool Pairs>
void block(const MatmulArgs& s, const Blocks& blocks, int64_t m, int64_t n, int64_t k, int64_t rows,
           int64_t columns, int64_t words) {
  const bool columns_of_a = by_column(s.a);
  for (int64_t j = 0; j < columns; j += kColumns) {
    const float* b = blocks.b + j * words;
    for (int64_t i = 0; i < rows; i += kRows) {
      const float* a = blocks.a + i * kRowStride;
      const Tile t{s.c + (m + i) * s.c_row + n + j,
                   s.c_row,
                   s.bias && k == 0 ? s.bias + n + j : nullptr,
                   s.accumulate || k > 0,
                   int(least(kRows, rows - i)),
                   int(least(kColumns, columns - j))};
      columns_of_a ? tile_of<1, kRows, Pairs>(a, b, words, t)
                   : tile_of<kRowStride, 1, Pairs>(a, b, words, t);
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

template <bool Pairs>
void multiply_all(const MatmulArgs& s, int rank, int members, float* workspace) {
  constexpr int kPerWord = Pairs ? 2 : 1;
  const Blocks blocks{workspace, workspace + int64_t(kBlockRows) * kRowStride};
  const int across = parts_of_rows(s, members);
  const Range rows = share(s.rows, kRows, rank % across, across);
  const Range columns = share(s.columns, kColumns, rank / across, members / across);
  for (int64_t n = columns.begin; n < columns.end; n += kBlockColumns) {
    const int64_t width = least(kBlockColumns, columns.end - n);
    for (int64_t k = 0; k < s.depth; k += kPerWord * kDepth) {
      const int64_t depth = least(kPerWord * kDepth, s.depth - k);
      pack_b_of<Pairs>(s, k, n, depth, width, blocks.b);
      for (int64_t m = rows.begin; m < rows.end; m += kBlockRows) {
        const int64_t height = least(kBlockRows, rows.end - m);
        pack_a_of<Pairs>(s, m, k, height, depth, blocks.a);
        block<Pairs>(s, blocks, m, n, k, height, width, (depth + kPerWord - 1) / kPerWord);
      }
    }
  }
}

}  // namespace

int64_t matmul_workspace() {
  return int64_t(kBlockRows) * kRowStride + int64_t(kBlockColumns) * kDepth;
}

void matmul(const MatmulArgs& s, int rank, int members, float* workspace) {
  const bool pairs = (s.a.bfloat16 || s.round) && (s.b.bfloat16 || s.round);
  if (kHasPairs && pairs) {
    multiply_all<kHasPairs>(s, rank, members, workspace);
  } else {
    multiply_all<false>(s, rank, members, workspace);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
