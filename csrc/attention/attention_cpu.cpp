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

  void start() {
    const Sequence& s = task.sequence;
    for (int64_t r = 0; r < count; ++r) {
      b.row[r] = row_at(a, s, head_of(r), place_of(r));
      b.top[r] = -kInfinity;
      store(b.sums + r * kLanes, Vec{});
      const Source<T> one =
          source<T>(a.q, s.batch, s.first_row + place_of(r), head_of(r), 1, a.size);
      pack_rows<Unit>(one, b.q + r * kPanel, b.rows * kPanel);
    }
    for (int64_t i = 0; i < b.rows * value_panels * kPanel; i += kLanes) store(b.out + i, Vec{});
  }

  void pack_keys() {
    const Sequence& s = task.sequence;
    tile_keys = least(kKeys, s.keys - tile);
    const int64_t first = s.first_key + tile;
    pack_transposed<Unit>(source<T>(a.k, s.batch, first, task.key_head, tile_keys, a.size), b.k);
    finite = PackAcross<Unit, T>::run(
        source<T>(a.v, s.batch, first, task.key_head, tile_keys, a.value_size), b.v,
        kKeys / Unit::kDepth * kPanel);
  }

  // part `i` of `parts` of the next tile
  void prefetch_keys(int64_t i, int64_t parts) {
    const Sequence& s = task.sequence;
    const int64_t next = tile + kKeys, rows = least(kKeys, s.keys - next);
    if (rows <= 0) return;
    const int64_t first = s.first_key + next, begin = kKeys * i / parts,
                  end = kKeys * (i + kTogether) / parts;
    prefetch_rows(source<T>(a.k, s.batch, first, task.key_head, rows, a.size), begin, end);
    prefetch_rows(source<T>(a.v, s.batch, first, task.key_head, rows, a.value_size), begin, end);
  }

  // scores of row r, its first at `scores`, in base 2 and masked; returns the largest
  float mask_row(int64_t r, float* scores, Columns c) {
    const Row& row = b.row[r];
    const int low = int(most(0, row.low - tile)), high = int(least(kKeys, row.high - tile));
    const float factor = a.scale * kLog2E;
    Vec largest = broadcast(-kInfinity);
    for (unsigned column = c.begin; column < c.end; column += kLanes) {
      float* at = scores + column / kPanel * kScorePanel + column % kPanel;
      const Vec x = select(inside(column, low, high), load(at) * factor, broadcast(-kInfinity));
      store(at, x);
      largest = larger(x, largest);
    }
    return spread_max(largest)[0];
  }
  float extend_row(int64_t r, float* scores, Columns c, const Extras& extras) {
    const Row& row = b.row[r];
    const int low = int(most(0, row.low - tile)), high = int(least(kKeys, row.high - tile));
    Vec largest = broadcast(-kInfinity), slack;
    for (unsigned column = c.begin; column < c.end; column += kLanes) {
      float* at = scores + column / kPanel * kScorePanel + column % kPanel;
      const Vec score = extras.score(load(at), column, &slack);
      const Vec x = select(inside(column, low, high), score, broadcast(-kInfinity));
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
  void exponentials(float* scores, float* packed, Columns c, float factor, float top, float* sums,
                    const float* keep) {
    Vec even{}, odd{};
    for (unsigned column = c.begin; column < c.end; column += kPanel) {
      float* at = scores + column / kPanel * kScorePanel;
      Vec first = exp2<Unit>(load(at) * factor - top),
          second = exp2<Unit>(load(at + kLanes) * factor - top);
      even += first;
      odd += second;
      if (keep) {
        first = first * load(keep + column);
        second = second * load(keep + column + kLanes);
      }
      put(scores, packed, column, first, second);
    }
    store(sums, load(sums) + (even + odd));
  }
  void put(float* scores, float* packed, unsigned column, Vec first, Vec second) {
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
        largest = extend_row(r0 + i, row, c, extras);
        if (dropped)
          for (unsigned j = c.begin; j < c.end; ++j) keep[i][j] = extras.keep[j];
      } else {
        largest = c.full ? largest_of_row(row, c) : mask_row(r0 + i, row, c);
      }
      before[i] = b.top[r0 + i];
      const float top = largest > before[i] ? largest : before[i];
      b.top[r0 + i] = top;
      after[i] = top == -kInfinity ? 0.f : top;
    }
    for (int i = 0; i < kRows; i += kLanes)
      store(factor + i, exp2(load(before + i) - load(after + i)));
    for (int64_t i = 0; i < rows; ++i) {
      float* sums = b.sums + (r0 + i) * kLanes;
      store(sums, load(sums) * factor[i]);
      exponentials(scores + i * kPanel, packed + i * kPanel, c, extended || !c.full ? 1.f : raw,
                   after[i], sums, dropped ? keep[i] : nullptr);
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

  // Blocks of rows from r0 on with the keys of the tile. A panel of keys serves all of them while
  // it is in the first-level cache.
  void blocks(int64_t r0, int64_t first, const Columns* columns, int64_t number) {
    const auto rows = [&](int64_t i) { return least(kRows, count - r0 - i * kRows); };
    for (unsigned column = 0; column < kKeys; column += kPanel)
      for (int64_t i = first; i < number; ++i) {
        if (column < columns[i].begin || column >= columns[i].end) continue;
        const int64_t r = r0 + i * kRows;
        multiply_rows<Unit, Finish::store>(
            {b.q + r * kPanel, b.rows * kPanel, b.k + column * depth, 0, depth,
             b.scores + column / kPanel * kScorePanel + place_in_scores(r), nullptr},
            rows(i));
      }
    float factor[kTogether][16];
    for (int64_t i = first; i < number; ++i) {
      const int64_t r = r0 + i * kRows, at = place_in_scores(r);
      if (!columns[i].empty())
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
          columns[i] = columns_of(b.row + r, least(kRows, count - r), tile);
          if (columns[i].empty()) continue;
          first = least(first, i);
          number = i + 1;
        }
        if (number == 0) continue;
        if (!packed) pack_keys();
        packed = true;
        if (tile + kKeys < high) prefetch_keys(r0 / kRows, up(b.rows / kRows, kTogether));
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
