// Forward: a task holds the queries of some rows, takes the keys tile by tile and keeps the softmax
// as it goes (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).
#include "attention/attention_scores.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kScorePanel = kTogether * kRows * kPanel;

struct Buffers {
  float* q;       // [words / kPanel][rows][kPanel]
  float* k;       // transposed, [kKeys / kPanel][words][kPanel]
  float* v;       // [Dv / kPanel][kKeys words][kPanel]
  float* scores;  // [kKeys / kPanel][kTogether kRows][kPanel], then the probabilities
  float* packed;  // the probabilities as words, where these are not floats
  float* out;     // [Dv / kPanel][rows][kPanel]
  float* sums;    // [rows][kLanes]
  float* top;     // [rows]: the largest score so far
  Row* row;       // [rows]
  Block* block;   // [rows / kRows]
  int64_t rows;   // up to a multiple of kRows
};

Buffers split(const Attention& a, int64_t rows, float* workspace, int64_t* total) {
  Buffers b;
  float* next = workspace;
  const int64_t size = up(a.size, kPanel), value_size = up(a.value_size, kPanel);
  b.rows = up(rows, kRows);
  b.q = take(&next, b.rows * size);
  b.k = take(&next, kKeys * size);
  b.v = take(&next, kKeys * value_size);
  b.scores = take(&next, kTogether * kRows * kKeys);
  b.packed = take(&next, kTogether * kRows * kKeys);
  b.out = take(&next, b.rows * value_size);
  b.sums = take(&next, b.rows * kLanes);
  b.top = take(&next, up(b.rows, kLanes));
  b.row = reinterpret_cast<Row*>(take(&next, b.rows * int64_t(sizeof(Row) / sizeof(float))));
  b.block = reinterpret_cast<Block*>(
      take(&next, b.rows / kRows * int64_t(sizeof(Block) / sizeof(float))));
  *total = next - workspace;
  return b;
}

template <class K>
struct Forward {
  using T = typename K::Element;
  using Unit = typename K::Unit;
  const AttentionForward& f;
  const Attention& a;
  const ForwardTask& task;
  Buffers b;
  int64_t count, depth, value_panels;
  int64_t tile = 0;  // its first key
  int64_t tile_keys = 0;
  bool finite = true;  // all values of the tile

  Forward(const AttentionForward& f, const ForwardTask& task, float* workspace)
      : f(f), a(f.shared), task(task) {
    int64_t total;
    count = task.end - task.begin;
    b = split(a, count, workspace, &total);
    depth = words<Unit>(a.size);
    value_panels = up(a.value_size, kPanel) / kPanel;
  }

  int64_t head_of(int64_t row) const {
    return task.key_head * a.group() + (task.begin + row) % a.group();
  }
  int64_t place_of(int64_t row) const { return (task.begin + row) / a.group(); }

  Source<T> query(int64_t r) const {
    const Sequence& s = task.sequence;
    return source<T>(a.q, s.batch, s.first_row + place_of(r), head_of(r), 1, a.size);
  }

  void start() {
    constexpr int64_t kAhead = 16;
    const Sequence& s = task.sequence;
    for (int64_t r = 0; r < count; ++r) {
      b.row[r] = row_at(a, s, head_of(r), place_of(r));
      if (r % kRows == 0) b.block[r / kRows] = Block();
      b.block[r / kRows].add(b.row[r]);
      b.top[r] = -kInfinity;
      store(b.sums + r * kLanes, Vec{});
      prefetch_rows(query(least(r + kAhead, count - 1)));
      pack_rows<Unit>(query(r), b.q + r * kPanel, b.rows * kPanel);
    }
    for (int64_t i = 0; i < b.rows * value_panels * kPanel; i += kLanes) store(b.out + i, Vec{});
  }

  void pack_keys() {
    const Sequence& s = task.sequence;
    tile_keys = least(kKeys, s.keys - tile);
    const int64_t first = s.first_key + tile;
    const Source<T> k = source<T>(a.k, s.batch, first, task.key_head, tile_keys, a.size);
    const Source<T> v = source<T>(a.v, s.batch, first, task.key_head, tile_keys, a.value_size);
    prefetch_rows(k);
    prefetch_rows(v);
    pack_transposed<Unit>(k, b.k);
    finite = PackAcross<Unit, T>::run(v, b.v, kKeys / Unit::kDepth * kPanel);
  }

  // scores of row r, its first product at `scores`, in base 2 and masked; returns the largest
  template <class Score>
  float mask_row(int64_t r, float* scores, Columns c, const Score& score) {
    const Row& row = b.row[r];
    const int low = int(most(0, row.low - tile)), high = int(least(kKeys, row.high - tile));
    Vec largest = broadcast(-kInfinity);
    for (unsigned column = c.begin; column < c.end; column += kLanes) {
      float* at = scores + column / kPanel * kScorePanel + column % kPanel;
      const Vec x =
          select(inside(column, low, high), score(load(at), column), broadcast(-kInfinity));
      store(at, x);
      largest = larger(x, largest);
    }
    return spread_max(largest)[0];
  }
  float largest_of_row(const float* scores, Columns c) {
    const float factor = a.scale * kLog2E;
    if (factor > 0) return largest_of_row<false>(scores, c, 1.f) * factor;
    return largest_of_row<true>(scores, c, factor);
  }
  template <bool kScaled>
  float largest_of_row(const float* scores, Columns c, float factor) {
    Vec even = broadcast(-kInfinity), odd = even;
    for (unsigned column = c.begin; column < c.end; column += kPanel) {
      const float* at = scores + column / kPanel * kScorePanel;
      even = larger(kScaled ? load(at) * factor : load(at), even);
      odd = larger(kScaled ? load(at + kLanes) * factor : load(at + kLanes), odd);
    }
    return spread_max(larger(even, odd))[0];
  }

  // probabilities of a row relative to `top`, and their sum
  struct Relative {
    float factor, top, earlier;  // earlier: what the sum so far is multiplied by
    const float* keep;           // of the dropout, or null
  };
  void exponentials(float* scores, float* packed, Columns c, const Relative& to, float* sums) {
    Vec sum{};
    unsigned column = c.begin;
    for (; column + 2 * kPanel <= c.end; column += 2 * kPanel)
      exponentials<2>(scores, packed, column, to, sum);
    if (column < c.end) exponentials<1>(scores, packed, column, to, sum);
    store(sums, load(sums) * to.earlier + sum);
  }
  template <int Panels>
  __attribute__((always_inline)) void exponentials(float* scores, float* packed, unsigned column,
                                                   const Relative& to, Vec& sum) {
    Vec x[2 * Panels];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * Panels; ++i)
      x[i] = load(scores + (column / kPanel + i / 2) * kScorePanel + i % 2 * kLanes) * to.factor -
             to.top;
    exp2(x, Unit{});
#pragma GCC unroll 2
    for (int i = 0; i < Panels; ++i) sum += x[2 * i] + x[2 * i + 1];
    if (to.keep) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * Panels; ++i) x[i] = x[i] * load(to.keep + column + i * kLanes);
    }
#pragma GCC unroll 2
    for (int i = 0; i < Panels; ++i)
      put(scores, packed, column + i * kPanel, x[2 * i], x[2 * i + 1]);
  }
  __attribute__((always_inline)) void put(float* scores, float* packed, unsigned column, Vec first,
                                          Vec second) {
#if defined(__AVX512F__)
    if constexpr (Unit::kDepth == 2) {
      const unsigned word = column / 2;
      store(packed + word / kPanel * kScorePanel + word % kPanel, pack_along(first, second));
      return;
    }
#endif
    float* at = scores + column / kPanel * kScorePanel;
    store(at, first);
    store(at + kLanes, second);
  }

  // A row keeps what its probabilities are relative to until a score is larger by more than this,
  // in base 2: bfloat16 and float32 lose nothing by that, and `direct_panel` need not know the
  // largest score of a tile before it has passed.
  static constexpr float kSlack = Unit::kDepth == 2 ? 8.f : 0.f;

  // softmax of the scores of `rows` rows from r0 on; factor[i]: what earlier sums are multiplied by
  void soften(int64_t r0, int64_t rows, float* scores, float* packed, Columns c, float* factor) {
    const float raw = a.scale * kLog2E;
    const bool extended = a.has_extras(), dropped = a.dropout > 0;
    float before[16] = {}, after[16] = {};
    float keep[kRows][kKeys];
    for (int64_t i = 0; i < rows; ++i) {
      float* row = scores + i * kPanel;
      float largest;
      if (extended) {
        const Extras extras(a, task.sequence, b.row[r0 + i], tile, c);
        Vec slack;
        largest = mask_row(r0 + i, row, c,
                           [&](Vec x, unsigned column) { return extras.score(x, column, &slack); });
        if (dropped)
          for (unsigned j = c.begin; j < c.end; ++j) keep[i][j] = extras.keep[j];
      } else {
        largest = c.full ? largest_of_row(row, c)
                         : mask_row(r0 + i, row, c, [&](Vec x, unsigned) { return x * raw; });
      }
      before[i] = b.top[r0 + i];
      const float top = largest > before[i] + kSlack ? largest : before[i];
      b.top[r0 + i] = top;
      after[i] = top == -kInfinity ? 0.f : top;
    }
    for (int i = 0; i < kRows; i += kLanes)
      store(factor + i, exp2(load(before + i) - load(after + i)));
    for (int64_t i = 0; i < rows; ++i) {
      float* sums = b.sums + (r0 + i) * kLanes;
      const Relative to{extended || !c.full ? 1.f : raw, after[i], factor[i],
                        dropped ? keep[i] : nullptr};
      exponentials(scores + i * kPanel, packed + i * kPanel, c, to, sums);
    }
  }

  // row r0's block of the scores, or of what is multiplied with the values
  static int64_t place_in_scores(int64_t r0) { return r0 % (kTogether * kRows) * kPanel; }

  void values(int64_t r0, int64_t rows, int64_t panel, Columns c, const float* factor) {
    const float* from = Unit::kDepth == 2 ? b.packed : b.scores;
    const Product p{from + place_in_scores(r0),
                    kScorePanel,
                    b.v + panel * (kKeys / Unit::kDepth * kPanel),
                    c.begin / Unit::kDepth,
                    words<Unit>(least(c.end, tile_keys)),
                    b.out + panel * (b.rows * kPanel) + r0 * kPanel,
                    factor};
    if (finite || c.full) return multiply_rows<Unit, Finish::scale>(p, rows);
    for (int64_t i = 0; i < rows; ++i)
      multiply_chosen<Unit, Finish::scale, false>(p, i, [&](int64_t k) {
        return halves_inside<Unit>(k, b.row[r0 + i].low - tile, b.row[r0 + i].high - tile);
      });
  }

  Product product_of_scores(int64_t r, unsigned column) const {
    return {b.q + r * kPanel,
            b.rows * kPanel,
            b.k + column * depth,
            0,
            depth,
            b.scores + column / kPanel * kScorePanel + place_in_scores(r),
            nullptr};
  }

  // what `direct_panel` leaves of a block of rows, if it may do them
  struct Direct {
    bool used;
    Vec sums[kRows];
    Vec largest;  // exponent
  };
  void start_direct(int64_t r, int64_t rows, const Columns& c, Direct* d) const {
    d->used = Unit::kDepth == 2 && c.full && rows == kRows && !a.has_extras();
    for (int64_t i = 0; d->used && i < kRows; ++i) d->used = b.top[r + i] != -kInfinity;
    if (!d->used) return;
    for (Vec& sum : d->sums) sum = Vec{};
    d->largest = broadcast(-kInfinity);
  }
  // Probabilities of a block of rows and a panel of keys, from the registers of the product
  // straight to words.
  __attribute__((noinline)) void direct_panel(int64_t r, unsigned column, Direct* d) {
    const float factor = a.scale * kLog2E;
    float* packed = b.packed + place_in_scores(r);
    Vec scores[kRows][2] = {}, largest = d->largest;
    accumulate<Unit, false>(product_of_scores(r, column), scores);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; i += 2) {
      Vec x[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        x[j] = scores[i + j / 2][j % 2] * factor - b.top[r + i + j / 2];
        largest = larger(x[j], largest);
      }
      exp2(x, Unit{});
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        d->sums[i + j] += x[2 * j] + x[2 * j + 1];
        put(nullptr, packed + (i + j) * kPanel, column, x[2 * j], x[2 * j + 1]);
      }
    }
    d->largest = largest;
  }
  // whether they can stay: then they join the sums
  bool keeps(int64_t r, const Direct& d, float* factor) {
    if (!d.used || any(d.largest > kSlack)) return false;
    for (int i = 0; i < kRows; ++i) {
      store(b.sums + (r + i) * kLanes, load(b.sums + (r + i) * kLanes) + d.sums[i]);
      factor[i] = 1.f;
    }
    return true;
  }

  // Blocks of rows from r0 on with the keys of the tile. A panel of keys serves all of them while
  // it is in the first-level cache.
  void blocks(int64_t r0, int64_t first, const Columns* columns, int64_t number) {
    const auto rows = [&](int64_t i) { return least(kRows, count - r0 - i * kRows); };
    const auto multiply_panel = [&](int64_t i, unsigned column) {
      multiply_rows<Unit, Finish::store>(product_of_scores(r0 + i * kRows, column), rows(i));
    };
    Direct direct[kTogether];
    for (int64_t i = first; i < number; ++i)
      start_direct(r0 + i * kRows, rows(i), columns[i], &direct[i]);
    for (unsigned column = 0; column < kKeys; column += kPanel)
      for (int64_t i = first; i < number; ++i) {
        if (column < columns[i].begin || column >= columns[i].end) continue;
        if (direct[i].used) {
          direct_panel(r0 + i * kRows, column, &direct[i]);
        } else {
          multiply_panel(i, column);
        }
      }
    float factor[kTogether][16];
    for (int64_t i = first; i < number; ++i) {
      const int64_t r = r0 + i * kRows, at = place_in_scores(r);
      if (columns[i].empty() || keeps(r, direct[i], factor[i])) continue;
      if (direct[i].used)
        for (unsigned column = columns[i].begin; column < columns[i].end; column += kPanel)
          multiply_panel(i, column);
      soften(r, rows(i), b.scores + at, b.packed + at, columns[i], factor[i]);
    }
    for (int64_t panel = 0; panel < value_panels; ++panel)
      for (int64_t i = first; i < number; ++i)
        if (!columns[i].empty()) values(r0 + i * kRows, rows(i), panel, columns[i], factor[i]);
  }

  void run() {
    start();
    int64_t low = task.sequence.keys, high = 0;
    for (int64_t r = 0; r < count; ++r) {
      if (b.row[r].high == 0) continue;
      low = least(low, b.row[r].low);
      high = most(high, b.row[r].high);
    }
    for (tile = low / kKeys * kKeys; tile < high; tile += kKeys) {
      bool packed = false;
      for (int64_t r0 = 0; r0 < count; r0 += kTogether * kRows) {
        Columns columns[kTogether];
        int64_t number = 0, first = kTogether;  // from the first to the last block with keys here
        for (int64_t i = 0; i < kTogether && r0 + i * kRows < count; ++i) {
          const int64_t r = r0 + i * kRows;
          columns[i] = b.block[r / kRows].columns(b.row + r, least(kRows, count - r), tile);
          if (columns[i].empty()) continue;
          first = least(first, i);
          number = i + 1;
        }
        if (number == 0) continue;
        if (!packed) pack_keys();
        packed = true;
        blocks(r0, first, columns, number);
      }
    }
    finish();
  }

  void finish() {
    const Sequence& s = task.sequence;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = head_of(r), place = s.first_row + place_of(r);
      float total = reduce_add(load(b.sums + r * kLanes)), top = b.top[r], factor = 1.f;
      if (a.sink && b.row[r].high > 0) {
        const float sink = a.sink[head] * kLog2E;
        const float both = sink > top ? sink : top, base = both == -kInfinity ? 0.f : both;
        factor = exp2(broadcast(top - base))[0];
        total = total * factor + exp2(broadcast(sink - base))[0];
        top = both;
      } else if (a.sink) {
        top = a.sink[head] * kLog2E;
        total = 1.f;
      }
      f.lse[(s.batch * a.heads + head) * a.rows + place] =
          b.row[r].high == 0 && a.sink ? a.sink[head] : natural_log_sum(top, total);
      const float scale = total == 0.f ? 0.f : factor / total;
      T* out =
          static_cast<T*>(f.out) + ((s.batch * a.rows + place) * a.heads + head) * a.value_size;
      write_row(b.out + r * kPanel, b.rows * kPanel, scale, out, a.value_size);
    }
  }

  // of scores in base 2
  static float natural_log_sum(float top, float total) {
    if (total == 0.f) return -kInfinity;
    return float(double(top) * 0.69314718055994531 + __builtin_log(double(total)));
  }
};

}  // namespace

int64_t attention_block_rows() { return kRows; }

int64_t attention_forward_workspace(const Attention& a, int64_t rows) {
  int64_t total;
  split(a, rows, nullptr, &total);
  return total;
}

void attention_forward(const AttentionForward& a, const ForwardTask& task, float* workspace) {
  with_kind(a.shared, [&](auto kind) { Forward<decltype(kind)>(a, task, workspace).run(); });
}

bool multiplies_pairs() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
