// Backward: a task takes the keys of one head tile by tile and all their queries, so dk and dv are
// complete after a tile and dq after the last; five products, each of them once.
#include "attention/attention_gradients.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

template <class K>
struct Backward {
  using T = typename K::Element;
  using Unit = typename K::Unit;
  using Tiles = Gradients<K>;
  static constexpr int kRowsOfTile = Tiles::kRowsOfTile;

  const AttentionBackward& f;
  const Attention& a;
  const BackwardTask& task;
  Tiles g;
  float *dq, *dk, *dv;  // panels of all rows, of all keys or of a tile of them
  int64_t dq_panel, dk_panel;
  bool all_keys;

  Backward(const AttentionBackward& f, const BackwardTask& task, float** next)
      : f(f), a(f.shared), task(task), g(f, task.sequence, task.sequence.rows, next) {
    const Sequence& s = task.sequence;
    // sums over several heads stay until the last one
    all_keys = task.dk || task.last_head - task.first_head > 1;
    dq_panel = padded(s.rows) * kPanel;
    dk_panel = (all_keys ? padded(s.keys) : kKeys) * kPanel;
    const int64_t size = up(a.size, kPanel), value_size = up(a.value_size, kPanel);
    dq = task.dq ? task.dq : take(next, dq_panel * size / kPanel);
    dk = task.dk ? task.dk : take(next, dk_panel * size / kPanel);
    dv = task.dv ? task.dv : take(next, dk_panel * value_size / kPanel);
  }

  FASTLM_INLINE void zero(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(x + i, Vec{});
  }

  // what a tile's keys add up, whichever other tasks write beside them
  void zero_tile(float* to, int64_t size) {
    for (int64_t panel = 0; panel * kPanel < size; ++panel)
      zero(to + panel * dk_panel, up(g.tile_keys, kPanel) * kPanel);
  }

  void run() {
    const Sequence& s = task.sequence;
    for (int64_t head = task.first_head; head < task.last_head; ++head) {
      g.start_head(head, 0, s.rows);
      float* head_dq = task.dq ? dq + (head - task.first_head) * dq_size() : dq;
      zero(head_dq, dq_size());
      for (int64_t tile = task.begin * kKeys; tile < least(s.keys, task.end * kKeys); tile += kKeys)
        keys(tile, head_dq, head);
      if (!task.dq) {
        for (int64_t r = 0; r < s.rows; ++r) {
          T* to = static_cast<T*>(f.dq) +
                  ((s.batch * a.rows + s.first_row + r) * a.heads + head) * a.size;
          write_row(dq + r * kPanel, dq_panel, a.scale, to, a.size);
        }
      }
      if (task.dslopes) task.dslopes[head - task.first_head] = -g.slope_sum;
      if (task.dsink) task.dsink[head - task.first_head] = sink_gradient(head);
    }
  }
  int64_t dq_size() const { return dq_panel * up(a.size, kPanel) / kPanel; }

  double sink_gradient(int64_t head) const {
    double sum = 0;
    const float sink = a.sink[head] * kLog2E;
    const float* lse =
        f.lse + (task.sequence.batch * a.heads + head) * a.rows + task.sequence.first_row;
    for (int64_t r = 0; r < task.sequence.rows; ++r) {
      if (lse[r] == -kInfinity) continue;
      sum -= double(exp2(broadcast(sink - g.h.base[r]))[0]) * g.h.delta[r];
    }
    return sum;
  }

  void keys(int64_t tile, float* head_dq, int64_t head) {
    const Sequence& s = task.sequence;
    float *tile_dk = dk, *tile_dv = dv;
    if (all_keys) tile_dk += tile * kPanel, tile_dv += tile * kPanel;
    g.tile = tile, g.tile_keys = least(kKeys, s.keys - tile);
    if (head == task.first_head) {
      zero_tile(tile_dk, a.size);
      zero_tile(tile_dv, a.value_size);
    }
    bool packed = false;
    for (int64_t i = 0; i < g.tiles(); ++i) {
      if (!g.attends(i)) continue;
      if (!packed) g.start_keys(tile);
      packed = true;
      g.run(i);
      add_dq(i, head_dq);
      add_across(i, g.t.p_across, g.h.dout_across, a.value_size, tile_dv);
      add_across(i, g.t.ds_across, g.h.q_across, a.size, tile_dk);
    }
    if (head + 1 < task.last_head || task.dk) return;
    for (int64_t j = 0; j < g.tile_keys; ++j) {
      const int64_t row = (s.batch * a.keys + s.first_key + tile + j) * a.key_heads + task.key_head;
      write_row(tile_dk + j * kPanel, dk_panel, a.scale, static_cast<T*>(f.dk) + row * a.size,
                a.size);
      write_row(tile_dv + j * kPanel, dk_panel, 1.f, static_cast<T*>(f.dv) + row * a.value_size,
                a.value_size);
    }
  }

  void add_dq(int64_t i, float* head_dq) {
    const int64_t rows = g.tile_rows(i);
    for (int64_t r0 = 0; r0 < rows; r0 += kRows) {
      const Columns c = g.columns[r0 / kRows];
      if (c.empty()) continue;
      const int64_t count = least(kRows, rows - r0), at = i * kRowsOfTile + r0;
      Product p{g.t.ds_along + r0 * kPanel,
                Tiles::kAlongPanel,
                nullptr,
                c.begin / Unit::kDepth,
                words<Unit>(least(c.end, g.tile_keys)),
                nullptr,
                nullptr};
      for (int64_t panel = 0; panel * kPanel < a.size; ++panel) {
        p.b = g.t.k_across + panel * (kKeys / Unit::kDepth * kPanel);
        p.c = head_dq + panel * dq_panel + at * kPanel;
        if (g.keys_finite || c.full) {
          multiply_rows<Unit, Finish::add>(p, count);
          continue;
        }
        for (int64_t r = 0; r < count; ++r)
          multiply_chosen<Unit, Finish::add, false>(p, r, [&](int64_t k) {
            const Row& row = g.h.row[at + r];
            return halves_inside<Unit>(k, row.low - g.tile, row.high - g.tile);
          });
      }
    }
  }

  // to += x^T rows, x [rows][kKeys] of query tile i
  void add_across(int64_t i, const float* x, const float* rows, int64_t size, float* to) {
    for (unsigned column = 0; column < g.tile_keys; column += kPanel) {
      // the rows from the first to the last block that attends to these keys
      int64_t begin = 0, end = 0;
      for (int64_t block = 0; block * kRows < g.tile_rows(i); ++block) {
        if (column < g.columns[block].begin || column >= g.columns[block].end) continue;
        if (end == 0) begin = block * kRows;
        end = least((block + 1) * kRows, g.tile_rows(i));
      }
      if (end == 0) continue;
      const int64_t keys = least(kPanel, g.tile_keys - column);
      for (int64_t panel = 0; panel * kPanel < size; ++panel) {
        for (int64_t key = 0; key < keys; key += kRows) {
          const Product p{x + column / kPanel * Tiles::kAcrossPanel + key,
                          0,
                          rows + (panel * g.h.rows + i * kRowsOfTile) / Unit::kDepth * kPanel,
                          begin / Unit::kDepth,
                          words<Unit>(end),
                          to + panel * dk_panel + (column + key) * kPanel,
                          nullptr};
          const int64_t count = least(kRows, keys - key);
          if (g.h.finite[i]) {
            multiply_rows<Unit, Finish::add, true>(p, least(kRows, kPanel - key));
            continue;
          }
          for (int64_t j = 0; j < count; ++j)
            multiply_chosen<Unit, Finish::add, true>(
                p, j, [&](int64_t k) { return rows_with(i, k, g.tile + column + key + j); });
        }
      }
    }
  }
  uint32_t rows_with(int64_t i, int64_t k, int64_t key) const {
    uint32_t found = kNone;
    for (int half = 0; half < Unit::kDepth; ++half) {
      const int64_t r = i * kRowsOfTile + k * Unit::kDepth + half;
      if (r >= g.count || key < g.h.row[r].low || key >= g.h.row[r].high) continue;
      found |= Unit::kDepth == 1 ? kBoth : half == 0 ? kLow : kHigh;
    }
    return found;
  }
};

// the gradient of a bias: probabilities and their gradients once more, by tiles of queries
template <typename T>
struct BiasGradient {
  using Tiles = Gradients<Kind<T, Singles>>;
  const AttentionBackward& f;
  Tiles g;

  BiasGradient(const AttentionBackward& f, const Sequence& s, int64_t rows, float** next)
      : f(f), g(f, s, rows, next) {
    g.wants_scores = true;
  }

  void run(int64_t head, int64_t begin, int64_t end) {
    g.start_head(head, begin, end);
    for (int64_t tile = 0; tile < g.s.keys; tile += kKeys) {
      bool packed = false;
      g.tile = tile, g.tile_keys = least(kKeys, g.s.keys - tile);
      for (int64_t i = 0; i < g.tiles(); ++i) {
        if (!g.attends(i)) continue;
        if (!packed) g.start_keys(tile);
        packed = true;
        g.run(i);
        add(i);
      }
    }
  }

  void add(int64_t i) {
    const Sequence& s = g.s;
    float* to = f.dbias + s.batch * f.dbias_batch + g.head * f.dbias_head +
                (s.first_key + g.tile) * f.dbias_key;
    float columns[kKeys] = {};  // sums over the rows of this tile
    for (int64_t r = 0; r < g.tile_rows(i); ++r) {
      const Columns c = g.columns[r / kRows];
      float* row = to + (s.first_row + g.first + i * Tiles::kRowsOfTile + r) * f.dbias_row;
      float sum = 0;
      for (int64_t j = c.begin; j < least(c.end, g.tile_keys); ++j) {
        const float ds = g.t.ds[j / kPanel * Tiles::kFloatPanel + r * kPanel + j % kPanel];
        if (f.dbias_row == 0) {
          columns[j] += ds;
        } else if (f.dbias_key == 0) {
          sum += ds;
        } else {
          row[j * f.dbias_key] += ds;
        }
      }
      if (f.dbias_row != 0 && f.dbias_key == 0) *row += sum;
    }
    if (f.dbias_row == 0)
      for (int64_t j = 0; j < g.tile_keys; ++j) to[j * f.dbias_key] += columns[j];
  }
};

template <typename T>
void bias_gradient(const AttentionBackward& f, const BiasTask& task, float* workspace) {
  for (const Sequence* s = task.first; s != task.last; ++s) {
    const int64_t begin = task.row_begin, end = least(s->rows, task.row_end);
    if (begin >= end) continue;
    float* next = workspace;
    BiasGradient<T> gradient(f, *s, end - begin, &next);
    for (int64_t head = task.first_head; head < task.last_head; ++head)
      gradient.run(head, begin, end);
  }
}

}  // namespace

void attention_bias(const AttentionBackward& f, const BiasTask& task, float* workspace) {
  if (f.shared.type == Type::float32) return bias_gradient<float>(f, task, workspace);
  if (f.shared.type == Type::float16) return bias_gradient<Half>(f, task, workspace);
  bias_gradient<BFloat16>(f, task, workspace);
}

int64_t attention_panels(int64_t rows, int64_t size) { return padded(rows) * up(size, kPanel); }

int64_t attention_backward_workspace(const Attention& a, int64_t rows, int64_t keys) {
  int64_t total = 0;
  with_kind(a, [&](auto kind) {
    using Unit = typename decltype(kind)::Unit;
    float* const start = nullptr;
    float* next = start;
    head_buffers<Unit>(a, rows, &next);
    tile_buffers<Unit>(a, &next);
    total = next - start;
  });
  return total + attention_panels(rows, a.size) +
         attention_panels(most(keys, kKeys), up(a.size, kPanel) + a.value_size);
}

void attention_backward(const AttentionBackward& f, const BackwardTask& task, float* workspace) {
  with_kind(f.shared, [&](auto kind) {
    float* next = workspace;
    Backward<decltype(kind)>(f, task, &next).run();
  });
}

void attention_sum(const PartialSums& s, int64_t begin, int64_t end) {
  const auto rows = [&](auto* to) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t c = 0; c < s.size; c += kLanes) {
        const float* from =
            s.first + c / kPanel * (padded(s.rows) * kPanel) + r * kPanel + c % kPanel;
        Vec sum = load(from);
        for (int64_t part = 1; part < s.parts; ++part) sum += load(from + part * s.part_stride);
        const int left = int(least(kLanes, s.size - c));
        auto* out = to + r * s.row_stride + c;
        left == kLanes ? store(out, sum * s.factor) : store_first(out, sum * s.factor, left);
      }
    }
  };
  if (s.type == Type::float32) return rows(static_cast<float*>(s.to));
  if (s.type == Type::float16) return rows(static_cast<Half*>(s.to));
  rows(static_cast<BFloat16*>(s.to));
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
