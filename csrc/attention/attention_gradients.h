// Probabilities and their gradients for a tile of queries and a tile of keys of one head.
#pragma once

#include "attention/attention_scores.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// of a tile; a word holds what one or two of them add to a sum
template <class Unit>
constexpr int kQueries = Unit::kDepth * 8 * kRows;
constexpr int kMostBlocks = 16;

// rows of a matrix in panels of which tiles write whole blocks of rows
FASTLM_INLINE int64_t padded(int64_t rows) { return up(rows, kPanel) + kPanel; }

struct HeadBuffers {
  float *q, *q_across;  // words along and across the rows; one matrix where both are floats
  float *dout, *dout_across;
  float *base, *delta, *dlse;  // of each row; base: lse in base 2
  Row* row;
  Block* block;
  int32_t *tile_low, *tile_high;  // keys that some row of a tile attends to
  int32_t* finite;                // whether q and dout are, for each tile
  int64_t rows;                   // padded
};
struct TileBuffers {
  float *k, *v;                            // transposed
  float* k_across;                         // [D / kPanel][kKeys words][kPanel]
  float *p, *ds;                           // [kKeys / kPanel][kQueries][kPanel]
  float *p_across, *ds_across, *ds_along;  // as words
};

template <class Unit>
HeadBuffers head_buffers(const Attention& a, int64_t rows, float** next) {
  HeadBuffers b;
  b.rows = padded(rows);
  const bool pairs = Unit::kDepth == 2;
  b.q = take(next, b.rows * up(words<Unit>(a.size), kPanel));
  b.q_across = pairs ? take(next, b.rows / 2 * up(a.size, kPanel)) : b.q;
  b.dout = take(next, b.rows * up(words<Unit>(a.value_size), kPanel));
  b.dout_across = pairs ? take(next, b.rows / 2 * up(a.value_size, kPanel)) : b.dout;
  b.base = take(next, b.rows);
  b.delta = take(next, b.rows);
  b.dlse = take(next, b.rows);
  b.row = reinterpret_cast<Row*>(take(next, b.rows * int64_t(sizeof(Row) / sizeof(float))));
  b.block = reinterpret_cast<Block*>(
      take(next, (b.rows / kRows + 1) * int64_t(sizeof(Block) / sizeof(float))));
  const int64_t tiles = b.rows / kQueries<Unit> + 1;
  b.tile_low = reinterpret_cast<int32_t*>(take(next, tiles));
  b.tile_high = reinterpret_cast<int32_t*>(take(next, tiles));
  b.finite = reinterpret_cast<int32_t*>(take(next, tiles));
  return b;
}
template <class Unit>
TileBuffers tile_buffers(const Attention& a, float** next) {
  TileBuffers b;
  const bool pairs = Unit::kDepth == 2;
  b.k = take(next, kKeys * words<Unit>(a.size));
  b.v = take(next, kKeys * words<Unit>(a.value_size));
  b.k_across = take(next, kKeys / Unit::kDepth * up(a.size, kPanel));
  const int64_t rows = kQueries<Unit>;
  b.p = take(next, (pairs ? kTogether * kRows : rows) * kKeys);
  b.ds = take(next, (pairs ? kTogether * kRows : rows) * kKeys);
  b.p_across = pairs ? take(next, rows / 2 * kKeys) : b.p;
  b.ds_across = pairs ? take(next, rows / 2 * kKeys) : b.ds;
  b.ds_along = pairs ? take(next, rows * kKeys / 2) : b.ds;
  return b;
}

template <class K>
struct Gradients {
  using T = typename K::Element;
  using Unit = typename K::Unit;
  static constexpr int kRowsOfTile = kQueries<Unit>;
  static constexpr int kAlongPanel = kRowsOfTile * kPanel;
  static constexpr int kAcrossPanel = kAlongPanel / Unit::kDepth;
  // of p and ds as floats
  static constexpr int kFloatPanel = Unit::kDepth == 2 ? kTogether * kRows * kPanel : kAlongPanel;

  const AttentionBackward& f;
  const Attention& a;
  Sequence s;
  HeadBuffers h;
  TileBuffers t;
  int64_t head = 0, first = 0, count = 0;  // rows [first, first + count) of the sequence
  int64_t tile = 0, tile_keys = 0;         // keys from `tile` on
  bool keys_finite = true;
  Columns columns[kMostBlocks];
  double slope_sum = 0;  // of ds * distance

  Gradients(const AttentionBackward& f, const Sequence& s, int64_t rows, float** next)
      : f(f), a(f.shared), s(s) {
    h = head_buffers<Unit>(a, rows, next);
    t = tile_buffers<Unit>(a, next);
  }

  int64_t tiles() const { return (count + kRowsOfTile - 1) / kRowsOfTile; }
  int64_t tile_rows(int64_t i) const { return least(kRowsOfTile, count - i * kRowsOfTile); }

  void start_head(int64_t new_head, int64_t begin, int64_t end) {
    head = new_head, first = begin, count = end - begin, slope_sum = 0;
    for (int64_t i = 0; i < tiles(); ++i) {
      h.tile_low[i] = int32_t(s.keys), h.tile_high[i] = 0;
      const int64_t at = i * kRowsOfTile, row = s.first_row + first + at, number = tile_rows(i);
      const Source<T> q = source<T>(a.q, s.batch, row, head, number, a.size);
      const Source<T> dout = source<T>(f.dout, s.batch, row, head, number, a.value_size);
      prefetch_rows(q);
      prefetch_rows(dout);
      prefetch_rows(source<T>(f.out, s.batch, row, head, number, a.value_size));
      for (int64_t r = at; r < at + number; ++r) {
        start_row(r);
        if (r % kRows == 0) h.block[r / kRows] = Block();
        h.block[r / kRows].add(h.row[r]);
        if (h.row[r].high == 0) continue;
        h.tile_low[i] = int32_t(least(h.tile_low[i], h.row[r].low));
        h.tile_high[i] = int32_t(most(h.tile_high[i], h.row[r].high));
      }
      const bool q_finite = pack_both(q, h.q, h.q_across, at);
      const bool dout_finite = pack_both(dout, h.dout, h.dout_across, at);
      h.finite[i] = q_finite && dout_finite;
    }
  }
  bool pack_both(const Source<T>& from, float* along, float* across, int64_t at) {
    const bool finite = pack_rows<Unit>(from, along + at * kPanel, h.rows * kPanel);
    if (Unit::kDepth == 2)
      PackAcross<Unit, T>::run(from, across + at / 2 * kPanel, h.rows / 2 * kPanel);
    return finite;
  }

  void start_row(int64_t r) {
    const int64_t place = s.first_row + first + r;
    const int64_t at = (s.batch * a.heads + head) * a.rows + place;
    Row row = row_at(a, s, head, first + r);
    const bool nothing = f.lse[at] == -kInfinity;
    // it takes no gradient, whatever arrives there
    if (nothing) row.low = row.high = 0;
    h.row[r] = row;
    h.base[r] = nothing ? 0.f : f.lse[at] * kLog2E;
    h.dlse[r] = nothing || !f.dlse ? 0.f : f.dlse[at];
    h.delta[r] = -h.dlse[r];
    if (row.high == 0) return;
    h.delta[r] +=
        dot(row_of<T>(f.dout, s.batch, place, head), row_of<T>(f.out, s.batch, place, head));
  }
  // 0 where the row attends to nothing
  float natural_lse(int64_t r) const {
    const float lse = f.lse[(s.batch * a.heads + head) * a.rows + s.first_row + first + r];
    return lse == -kInfinity ? 0.f : lse;
  }
  float dot(const T* x, const T* y) const {
    Vec sum{};
    int64_t c = 0;
    for (; c + kLanes <= a.value_size; c += kLanes) sum += load(x + c) * load(y + c);
    if (const int left = int(a.value_size - c))
      sum += load_first(x + c, left, 0.f) * load_first(y + c, left, 0.f);
    return reduce_add(sum);
  }

  void start_keys(int64_t new_tile) {
    tile = new_tile, tile_keys = least(kKeys, s.keys - tile);
    const int64_t key = s.first_key + tile, key_head = head / a.group();
    const Source<T> k = source<T>(a.k, s.batch, key, key_head, tile_keys, a.size);
    const Source<T> v = source<T>(a.v, s.batch, key, key_head, tile_keys, a.value_size);
    prefetch_rows(k);
    prefetch_rows(v);
    pack_transposed<Unit>(k, t.k);
    keys_finite = PackAcross<Unit, T>::run(k, t.k_across, kKeys / Unit::kDepth * kPanel);
    pack_transposed<Unit>(v, t.v);
  }

  bool attends(int64_t i) const {
    return h.tile_low[i] < tile + tile_keys && h.tile_high[i] > tile;
  }

  // p and ds of query tile i and these keys; 0 where a row does not attend
  void run(int64_t i) {
    const int64_t rows = tile_rows(i);
    for (int64_t r0 = 0; r0 < rows; r0 += kTogether * kRows) {
      const int64_t blocks = least(kTogether, (rows - r0 + kRows - 1) / kRows);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t at = r0 + b * kRows;
        const int64_t row = i * kRowsOfTile + at;
        columns[at / kRows] =
            h.block[row / kRows].columns(h.row + row, least(kRows, rows - at), tile);
        prefetch(i + 1, at);
      }
      // a panel of keys serves several blocks of rows while it is in the first-level cache
      for (unsigned column = 0; column < kKeys; column += kPanel)
        for (int64_t b = 0; b < blocks; ++b) multiply_block(i, r0 + b * kRows, column);
      for (int64_t b = 0; b < blocks; ++b) finish_block(i, r0 + b * kRows);
    }
  }

  void multiply_block(int64_t i, int64_t r0, unsigned column) {
    const Columns& c = columns[r0 / kRows];
    if (column < c.begin || column >= c.end) return clear(column, r0);
    const int64_t to = column / kPanel * kFloatPanel + float_row(r0) * kPanel;
    const int64_t rows = least(kRows, tile_rows(i) - r0), at = (i * kRowsOfTile + r0) * kPanel;
    const int64_t depth = words<Unit>(a.size), value_depth = words<Unit>(a.value_size);
    Product scores{h.q + at, h.rows * kPanel, t.k + column * depth, 0, depth, t.p + to, nullptr};
    Product gradients{h.dout + at, h.rows * kPanel, t.v + column * value_depth, 0, value_depth,
                      t.ds + to,   nullptr};
    if constexpr (Unit::kDepth == 2) {
      if (direct(c, rows)) {
        for (int64_t r = 0; r < kRows; r += kRows / 2) {
          half_block(scores, gradients, i * kRowsOfTile + r0 + r, r0 + r, column);
          scores.a += kRows / 2 * kPanel, gradients.a += kRows / 2 * kPanel;
        }
        return;
      }
    }
    multiply_rows<Unit, Finish::store>(scores, rows);
    multiply_rows<Unit, Finish::store>(gradients, rows);
  }
  // whether the words of a block are made in registers
  bool direct(const Columns& c, int64_t rows) const {
    return Unit::kDepth == 2 && c.full && rows == kRows && !a.has_extras();
  }

  void finish_block(int64_t i, int64_t r0) {
    const Columns& c = columns[r0 / kRows];
    if (c.empty()) return;
    const int64_t rows = least(kRows, tile_rows(i) - r0), at = i * kRowsOfTile + r0;
    if (direct(c, rows)) return;
    for (int64_t r = 0; r < rows; ++r) {
      if (a.has_extras()) {
        extended_row(at + r, float_row(r0) + r, c);
      } else if (c.full) {
        plain_row<false>(at + r, float_row(r0) + r, c);
      } else {
        plain_row<true>(at + r, float_row(r0) + r, c);
      }
    }
    pack_block(r0, rows, c);
  }

  // rows of a block of tile i, for the products that come next, into the second-level cache
  void prefetch(int64_t i, int64_t r0) const {
    if (i >= tiles()) return;
    const int64_t row = (i * kRowsOfTile + r0) * kPanel, across = row / Unit::kDepth;
    const int64_t panel = h.rows * kPanel;
    prefetch_panels(h.q + row, panel, words<Unit>(a.size), kRows);
    prefetch_panels(h.dout + row, panel, words<Unit>(a.value_size), kRows);
    if (Unit::kDepth == 1) return;
    prefetch_panels(h.q_across + across, panel / 2, a.size, kRows / 2);
    prefetch_panels(h.dout_across + across, panel / 2, a.value_size, kRows / 2);
  }
  static void prefetch_panels(const float* from, int64_t panel, int64_t size, int64_t rows) {
    for (int64_t c = 0; c < size; c += kPanel, from += panel)
      for (int64_t x = 0; x < rows * kPanel; x += 16) __builtin_prefetch(from + x, 0, 2);
  }

  // where row r0 of the tile stands in p and ds as floats
  static int64_t float_row(int64_t r0) { return Unit::kDepth == 2 ? r0 % (kTogether * kRows) : r0; }

  // a row with one key: as the definition has it, so that its gradient is exactly 0
  bool settle_single(int64_t r, const float* dp_row) {
    const Row& row = h.row[r];
    if (row.high - row.low != 1 || a.sink || row.low < tile || row.low >= tile + kKeys)
      return false;
    const int64_t column = row.low - tile;
    h.delta[r] = dp_row[column / kPanel * kFloatPanel + column % kPanel] - h.dlse[r];
    return true;
  }

  // A row whose keys all stand in this tile: delta as the definition has it. Where a p is nearly 1,
  // dp - delta cancels, and out . dout would differ by the rounding of both. As lse was rounded,
  // the p do not add up to 1; delta is their mean of dp, so that ds adds up to 0 all the same.
  // exponent(score, column) is that of p.
  template <class Exponent>
  void settle(int64_t r, const float* p, const float* ds, Columns c, const Exponent& exponent) {
    const Row& row = h.row[r];
    if (settle_single(r, ds) || Unit::kDepth == 2) return;
    if (row.low < tile || row.high > tile + kKeys) return;
    const int low = int(row.low - tile), high = int(row.high - tile);
    Vec sum{}, shares{};
    for (unsigned column = c.begin; column < c.end; column += kLanes) {
      const int64_t at = column / kPanel * kFloatPanel + column % kPanel;
      const VecInt in = inside(column, low, high);
      const Vec x = exp2<Unit>(exponent(load(p + at), column));
      shares += select(in, x, Vec{});
      sum += select(in, x * load(ds + at), Vec{});
    }
    float all = reduce_add(shares);
    if (a.sink) all += exp2(broadcast(a.sink[head] * kLog2E - h.base[r]))[0];
    h.delta[r] = reduce_add(sum) / (all > 0.f ? all : 1.f) - h.dlse[r];
  }

  template <bool kMasked>
  void plain_row(int64_t r, int64_t in_tile, Columns c) {
    float *p = t.p + in_tile * kPanel, *ds = t.ds + in_tile * kPanel;
    const int low = int(most(0, h.row[r].low - tile)),
              high = int(least(kKeys, h.row[r].high - tile));
    const float factor = a.scale * kLog2E, base = h.base[r];
    settle(r, p, ds, c, [&](Vec x, unsigned) { return x * factor - base; });
    const float delta = h.delta[r];
    for (unsigned column = c.begin; column < c.end; column += kPanel) {
      const int64_t at = column / kPanel * kFloatPanel;
      Vec x[2], y[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        x[v] = load(p + at + v * kLanes) * factor - base;
        y[v] = load(ds + at + v * kLanes) - delta;
      }
      exp2(x, Unit{});
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        y[v] = x[v] * y[v];
        if (kMasked) {
          const VecInt in = inside(column + v * kLanes, low, high);
          x[v] = select(in, x[v], Vec{});
          y[v] = select(in, y[v], Vec{});
        }
        store(p + at + v * kLanes, x[v]);
        store(ds + at + v * kLanes, y[v]);
      }
    }
  }

  void extended_row(int64_t r, int64_t in_tile, Columns c) {
    float *p = t.p + in_tile * kPanel, *ds = t.ds + in_tile * kPanel;
    const Extras extras(a, s, h.row[r], tile, c);
    const int low = int(most(0, h.row[r].low - tile)),
              high = int(least(kKeys, h.row[r].high - tile));
    const bool dropped = a.dropout > 0;
    if (dropped)
      for (unsigned column = c.begin; column < c.end; column += kLanes) {
        float* at = ds + column / kPanel * kFloatPanel + column % kPanel;
        store(at, load(at) * load(extras.keep + column));
      }
    const float lse = natural_lse(r);
    settle(r, p, ds, c, [&](Vec x, unsigned column) {
      Vec slack;
      return extras.score(x, column, &slack, lse);
    });
    const float delta = h.delta[r];
    Vec distances{};
    for (unsigned column = c.begin; column < c.end; column += kLanes) {
      const int64_t at = column / kPanel * kFloatPanel + column % kPanel;
      const VecInt in = inside(column, low, high);
      Vec slack = broadcast(1.f);
      const Vec x = exp2<Unit>(extras.score(load(p + at), column, &slack, lse));
      const Vec y = select(in, x * (load(ds + at) - delta), Vec{});
      if (a.slopes) distances += y * extras.distance(column);
      store(p + at, select(in, dropped ? x * load(extras.keep + column) : x, Vec{}));
      store(ds + at, wants_scores ? y : select(in, y * slack, Vec{}));
    }
    slope_sum += reduce_add(distances);
  }
  bool wants_scores = false;  // ds of the scores themselves, for the gradient of the bias

  // words of p and ds, two panels' halves of rows r and r + 1 of the tile
  void put_words(int64_t r, unsigned column, const Vec (&p)[2][2], const Vec (&ds)[2][2]) {
#if defined(__AVX512F__)
    if constexpr (Unit::kDepth == 2) {
      const int64_t to = column / kPanel * kAcrossPanel + r / 2 * kPanel;
      const unsigned word = column / 2;
      float* along = t.ds_along + word / kPanel * kAlongPanel + r * kPanel + word % kPanel;
      for (int v = 0; v < 2; ++v) {
        store(t.p_across + to + v * kLanes, pack_across(p[0][v], p[1][v]));
        store(t.ds_across + to + v * kLanes, pack_across(ds[0][v], ds[1][v]));
        store(along + v * kPanel, pack_along(ds[v][0], ds[v][1]));
      }
    }
#endif
  }
  // what the rows of a block left as floats
  void pack_block(int64_t r0, int64_t count, Columns c) {
    if (Unit::kDepth == 1) return;
    for (int64_t r = 0; r < count; r += 2) {
      for (unsigned column = c.begin; column < c.end; column += kPanel) {
        Vec p[2][2] = {}, ds[2][2] = {};
        for (int64_t i = 0; i < least(2, count - r); ++i) {
          const int64_t at = column / kPanel * kFloatPanel + (float_row(r0) + r + i) * kPanel;
          for (int v = 0; v < 2; ++v) {
            p[i][v] = load(t.p + at + v * kLanes);
            ds[i][v] = load(t.ds + at + v * kLanes);
          }
        }
        put_words(r0 + r, column, p, ds);
      }
    }
  }
  // As `plain_row` for half a block of rows and a panel of keys, from the registers of the products
  // straight to words.
  __attribute__((noinline)) void half_block(const Product& scores, const Product& gradients,
                                            int64_t r, int64_t in_tile, unsigned column) {
    const float factor = a.scale * kLog2E;
    Vec p[kRows / 2][2] = {}, ds[kRows / 2][2] = {};
    accumulate_both<Unit>(scores, gradients, p, ds);
#pragma GCC unroll 6
    for (int i = 0; i < kRows / 2; i += 2) {
      Vec x[4], y[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[j] = p[i + j / 2][j % 2] * factor - h.base[r + i + j / 2];
      exp2(x, Unit{});
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) y[j] = x[j] * (ds[i + j / 2][j % 2] - h.delta[r + i + j / 2]);
      put_words(in_tile + i, column, {{x[0], x[1]}, {x[2], x[3]}}, {{y[0], y[1]}, {y[2], y[3]}});
    }
  }
  // columns of a panel that no row of a block attends to
  void clear(unsigned column, int64_t r0) {
    const int64_t at = column / kPanel * kAcrossPanel + r0 / Unit::kDepth * kPanel;
    for (int64_t i = 0; i < kRows / Unit::kDepth * kPanel; i += kLanes) {
      store(t.p_across + at + i, Vec{});
      store(t.ds_across + at + i, Vec{});
    }
  }
};

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
