// Where the decoding kernel keeps things, and the tiles of its products. Include in *_cpu.cpp only.
#pragma once

#include "embedding_gru/embedding_gru_step.h"
#include "embedding_gru/embedding_gru_words.h"
#include "generation/generation.h"
#include "matmul/matmul_chain.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// extra floats per row: rows of equal power-of-two stride would fall into the same cache sets
constexpr int64_t kSkew = 16;
constexpr int64_t kMaxLanes = 16;

FASTLM_INLINE int64_t round_up_to(int64_t count, int64_t unit) {
  return (count + unit - 1) / unit * unit;
}
FASTLM_INLINE int64_t head_panels(int64_t classes) {
  return (classes + kGates * kLanes - 1) / (kGates * kLanes);
}

// What all members of the team see; written between barriers.
struct Shared {
  int64_t count;       // sequences that have not ended
  int64_t ended_step;  // the last step at which one has
};

struct Matrix {
  bool bfloat16;
  const float* panels;  // packed, or null
  const void* w;        // [rows, depth]
  const float* bias;    // [rows] or null
  int64_t rows, depth;
  bool gates;
};

// one panel that a thread has packed for itself
struct PanelCache {
  const void* w;
  int64_t panel;
  float* buffer;
};

FASTLM_INLINE void pack_any(const void* w, bool bfloat16, const float* bias, int64_t depth,
                            const PanelColumns& columns, float* panel) {
  bfloat16 ? pack_panel_words(static_cast<const BFloat16*>(w), bias, depth, columns, panel)
           : pack_panel(static_cast<const float*>(w), bias, depth, columns, panel);
}
FASTLM_INLINE int64_t words_or_floats(int64_t depth, bool bfloat16) {
  return bfloat16 ? words_of(depth) : depth;
}

FASTLM_INLINE const float* panel_of(const Matrix& m, int64_t panel, PanelCache* cache) {
  if (m.panels) return m.panels + panel * panel_size(words_or_floats(m.depth, m.bfloat16));
  if (cache->w != m.w || cache->panel != panel) {
    cache->w = m.w;
    cache->panel = panel;
    pack_any(m.w, m.bfloat16, m.bias, m.depth,
             m.gates ? gate_columns(m.rows / kGates, panel) : class_columns(m.rows, panel),
             cache->buffer);
  }
  return cache->buffer;
}

// sum[i] = bias + a[i] times a panel of m, in one chain: to the bits of the layers' own kernel
template <int Rows>
FASTLM_INLINE void multiply_matrix(const Matrix& m, const float* panel, const float* a,
                                   int64_t stride, Vec (&sum)[Rows][kGates]) {
  m.bfloat16 ? multiply_panel_of<Operands::widened, Rows>(a, stride, panel, m.depth, sum)
             : multiply_panel<Rows>(a, stride, panel, m.depth, sum);
}

template <Operands K, int Rows>
FASTLM_INLINE void multiply_chains_of(const float* a, int64_t stride, const float* panel,
                                      int64_t depth, Vec (&sum)[Rows][kGates]) {
  constexpr int64_t kWords = K == Operands::floats ? kChain : kChain / 2;
  static_assert(kChain % 2 == 0, "a word is in one chain");
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) sum[i][g] = load(panel + g * kLanes);
  }
  panel += kGates * kLanes;
  for (int64_t k = 0; k < depth; k += kChain, panel += kWords * kGates * kLanes) {
    Vec chain[Rows][kGates] = {};
    multiply_of<K, Rows, kGates>(a + k, stride, panel, depth - k < kChain ? depth - k : kChain,
                                 chain);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
      for (int g = 0; g < kGates; ++g) sum[i][g] += chain[i][g];
    }
  }
}

// the same, to the bits of `matmul` of floats
template <int Rows>
FASTLM_INLINE void multiply_chains(const Matrix& m, const float* panel, const float* a,
                                   int64_t stride, Vec (&sum)[Rows][kGates]) {
  m.bfloat16 ? multiply_chains_of<Operands::widened, Rows>(a, stride, panel, m.depth, sum)
             : multiply_chains_of<Operands::floats, Rows>(a, stride, panel, m.depth, sum);
}

FASTLM_INLINE Matrix raw_matrix(const DecoderWeights& w, int64_t at, int64_t bias_at, int64_t rows,
                                int64_t depth, bool gates) {
  if (w.packed) return {w.bfloat16, w.packed, nullptr, nullptr, rows, depth, gates};
  return {w.bfloat16,
          nullptr,
          reinterpret_cast<const void*>(w.raw[at]),
          reinterpret_cast<const float*>(w.raw[bias_at]),
          rows,
          depth,
          gates};
}
// padded for the widest vectors, as the packed matrices stand
FASTLM_INLINE int64_t gates_size(const DecoderWeights& w, int64_t depth) {
  return 3 * round_up_to(w.shape.hidden, kMaxLanes) * (words_or_floats(depth, w.bfloat16) + 1);
}
FASTLM_INLINE Matrix input_matrix(const DecoderWeights& w, int64_t layer) {
  const DecoderShape& s = w.shape;
  const int64_t depth = layer == 0 ? s.embedding_dim : s.hidden;
  Matrix m = raw_matrix(w, 4 * layer, 4 * layer + 2, kGates * s.hidden, depth, true);
  if (m.panels && layer > 0)
    m.panels += gates_size(w, s.embedding_dim) + (2 * layer - 1) * gates_size(w, s.hidden);
  return m;
}
FASTLM_INLINE Matrix hidden_matrix(const DecoderWeights& w, int64_t layer) {
  const DecoderShape& s = w.shape;
  Matrix m = raw_matrix(w, 4 * layer + 1, 4 * layer + 3, kGates * s.hidden, s.hidden, true);
  if (m.panels) m.panels += gates_size(w, s.embedding_dim) + 2 * layer * gates_size(w, s.hidden);
  return m;
}
FASTLM_INLINE Matrix head_matrix(const DecoderWeights& w) {
  const DecoderShape& s = w.shape;
  Matrix m = raw_matrix(w, 4 * s.layers, 4 * s.layers + 1, s.classes, s.hidden, false);
  if (m.panels)
    m.panels += gates_size(w, s.embedding_dim) + (2 * s.layers - 1) * gates_size(w, s.hidden);
  return m;
}

struct Buffers {
  float* x;          // [slots][input_stride] embeddings of the tokens read next
  float* state[2];   // [L][slots][state_stride], zero past H
  float* logits;     // [group][logits_stride]
  float* scratch;    // [scratch_size] of this thread, for the draw
  float* penalised;  // [classes] of this thread, where there are penalties
  int64_t input_stride, state_stride, logits_stride, scratch_size, group;
  PanelCache cache[2];  // of this thread
  Shared* shared;
  int64_t* row;    // [slots] its row
  int64_t* input;  // [slots] the token it reads next
  int64_t* ended;  // [slots] 1: has ended at ended_step
};

// carves the workspace for one member; must agree with generation_workspace
FASTLM_INLINE Buffers make_buffers(const DecoderShape& s, int64_t batch, float* workspace,
                                   int threads, int rank, bool penalties) {
  Buffers b;
  b.input_stride = round_up_to(s.embedding_dim, kMaxLanes) + kSkew;
  b.state_stride = round_up_to(s.hidden, kMaxLanes) + kSkew;
  b.logits_stride = round_up_to(s.classes, 3 * kMaxLanes) + kSkew;
  b.scratch_size = generation_draw_scratch(s, penalties);
  b.group = generation_group(s, batch);
  b.state[0] = workspace;
  b.state[1] = b.state[0] + s.layers * batch * b.state_stride;
  b.x = b.state[1] + s.layers * batch * b.state_stride;
  b.logits = b.x + batch * b.input_stride;
  float* own = b.logits + b.group * b.logits_stride;
  b.scratch = own + rank * b.scratch_size;
  b.penalised = b.scratch + generation_draw_scratch(s, false);
  own += threads * b.scratch_size;
  const int64_t panel = generation_panel_scratch(s);
  for (int i = 0; i < 2; ++i) b.cache[i] = {nullptr, -1, own + rank * panel + i * panel / 2};
  int64_t* integers = reinterpret_cast<int64_t*>(own + threads * panel);
  b.shared = reinterpret_cast<Shared*>(integers);
  b.row = integers + kMaxLanes;
  b.input = b.row + batch;
  b.ended = b.input + batch;
  return b;
}

// Tiles of `count` rows: kRows each, and one of each smaller power of two that is needed.
struct RowTiles {
  int64_t full, count;
  int rest;
  static RowTiles of(int64_t rows) {
    RowTiles t;
    t.full = rows / kRows;
    t.rest = int(rows % kRows);
    t.count = t.full + (t.rest & 1) + (t.rest >> 1 & 1) + (t.rest >> 2 & 1);
    return t;
  }
};
// action.run<Rows>(column, row) for the tiles of [0, columns) x [0, rows) that this member has
template <typename Action>
FASTLM_INLINE void for_tiles(int64_t columns, int64_t rows, int rank, int members,
                             const Action& action) {
  const RowTiles tiles = RowTiles::of(rows);
  const Range own = share(columns * tiles.count, rank, members);
  int64_t column = own.begin / tiles.count, tile = own.begin % tiles.count;
  for (int64_t item = own.begin; item < own.end; ++item) {
    if (tile < tiles.full) {
      action.template run<kRows>(column, tile * kRows);
    } else {
      // the smaller ones, largest first
      int64_t row = tiles.full * kRows, skip = tile - tiles.full;
      int size = 4;
      for (; !((tiles.rest & size) && skip-- == 0); size /= 2) row += tiles.rest & size;
      if (kRows == 8 && size == 4) action.template run<4>(column, row);
      if (size == 2) action.template run<2>(column, row);
      if (size == 1) action.template run<1>(column, row);
    }
    if (++tile == tiles.count) tile = 0, ++column;
  }
}

// where a step's gates and states are kept for a backward
struct Saved {
  float* output;  // of this layer and step 0, or null
  float* gates;
  int64_t steps, step;
};

struct LayerTile {
  const DecoderWeights& weights;
  Buffers& buffers;
  Matrix input, recurrent;
  int64_t layer, batch;
  int parity;
  Saved saved;

  template <int Rows>
  void run(int64_t vector, int64_t slot) const {
    const DecoderShape& s = weights.shape;
    const int64_t hidden = s.hidden, column = vector * kLanes, stride = buffers.state_stride;
    const float* h = buffers.state[parity] + (layer * batch + slot) * stride;
    float* next = buffers.state[1 - parity] + (layer * batch + slot) * stride;
    const bool looked_up = layer == 0 && weights.table;
    Vec x[Rows][kGates], sum[Rows][kGates];
    if (!looked_up) {
      const float* from =
          layer == 0 ? buffers.x + slot * buffers.input_stride : next - batch * stride;
      multiply_chains<Rows>(input, panel_of(input, vector, &buffers.cache[0]), from,
                            layer == 0 ? buffers.input_stride : stride, x);
    }
    multiply_matrix<Rows>(recurrent, panel_of(recurrent, vector, &buffers.cache[1]), h, stride,
                          sum);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      if (looked_up) {
        const float* row = weights.table + buffers.input[slot + i] * kGates * hidden;
#pragma GCC unroll 8
        for (int g = 0; g < kGates; ++g) x[i][g] = load_columns(row + g * hidden, column, hidden);
      }
      const int64_t n = buffers.row[slot + i] * saved.steps + saved.step;
      Vec out = gru_cell(x[i], sum[i], load(h + i * stride + column), column, hidden,
                         saved.gates ? saved.gates + n * 4 * hidden : nullptr);
      store(next + i * stride + column, out);
      if (saved.output) store_columns(saved.output + n * hidden, column, hidden, out);
    }
  }
};

struct HeadTile {
  Matrix head;
  Buffers& buffers;
  const float* h;  // [rows][state_stride]

  template <int Rows>
  void run(int64_t panel, int64_t row) const {
    Vec sum[Rows][kGates];
    multiply_chains<Rows>(head, panel_of(head, panel, &buffers.cache[0]),
                          h + row * buffers.state_stride, buffers.state_stride, sum);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float* logits = buffers.logits + (row + i) * buffers.logits_stride;
#pragma GCC unroll 8
      for (int v = 0; v < kGates; ++v) store(logits + (panel * kGates + v) * kLanes, sum[i][v]);
    }
  }
};

FASTLM_INLINE void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
