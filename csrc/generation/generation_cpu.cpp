// One parallel region a call. A layer's tiles, and the head's, are shared out over columns and
// rows; the threads meet after each of them. Then every slot's next token is drawn, or read from
// its prompt, and its embedding fetched.
#include "common/philox.h"
#include "embedding_gru/embedding_gru_step.h"
#include "generation/generation.h"
#include "sampling/sampling_row.h"

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
struct Slots {
  int64_t count;       // sequences that have not ended
  int64_t ended_step;  // the last step at which one has
  int64_t* row;        // [slots] its row
  int64_t* input;      // [slots] the token it reads next
  int64_t* ended;      // [slots] 1: has ended at ended_step
};

struct Buffers {
  const float* input_weights[2];  // of layer 0, of layer 1
  const float* layer_weights;     // w_hh of layer 0; of layer 1, `layer_size` further
  const float* head;
  int64_t layer_size;
  float* x;         // [slots][input_stride] embeddings of the tokens read next
  float* state[2];  // [L][slots][state_stride], zero past H
  float* logits;    // [group][logits_stride]
  float* scratch;   // [threads][scratch_size]
  int64_t input_stride, state_stride, logits_stride, scratch_size, group;
  Slots* slots;
};

// carves the workspace; must agree with generation_workspace
FASTLM_INLINE Buffers make_buffers(const DecoderWeights& w, int64_t batch, float* workspace,
                                   int threads) {
  const DecoderShape& s = w.shape;
  Buffers b;
  const int64_t units = round_up_to(s.hidden, kMaxLanes);
  const int64_t first = 3 * units * (s.embedding_dim + 1), square = 3 * units * (s.hidden + 1);
  b.input_weights[0] = w.packed;
  b.layer_weights = w.packed + first;
  b.layer_size = 2 * square;
  b.input_weights[1] = b.layer_weights + square;
  b.head = b.layer_weights + square + (s.layers - 1) * b.layer_size;
  b.input_stride = round_up_to(s.embedding_dim, kMaxLanes) + kSkew;
  b.state_stride = units + kSkew;
  b.logits_stride = round_up_to(s.classes, 3 * kMaxLanes) + kSkew;
  b.scratch_size = round_up_to(sample_scratch(s.classes), kMaxLanes);
  b.group = generation_group(s, batch);
  b.state[0] = workspace;
  b.state[1] = b.state[0] + s.layers * batch * b.state_stride;
  b.x = b.state[1] + s.layers * batch * b.state_stride;
  b.logits = b.x + batch * b.input_stride;
  b.scratch = b.logits + b.group * b.logits_stride;
  int64_t* integers = reinterpret_cast<int64_t*>(b.scratch + threads * b.scratch_size);
  b.slots = reinterpret_cast<Slots*>(integers);
  integers += kMaxLanes;
  if (threads > 0) {
    b.slots->row = integers;
    b.slots->input = integers + batch;
    b.slots->ended = integers + 2 * batch;
  }
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
  const Buffers& buffers;
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
      const int64_t depth = layer == 0 ? s.embedding_dim : hidden;
      const float* input =
          layer == 0 ? buffers.x + slot * buffers.input_stride : next - batch * stride;
      const float* w = layer == 0 ? buffers.input_weights[0]
                                  : buffers.input_weights[1] + (layer - 1) * buffers.layer_size;
      multiply_panel<Rows>(input, layer == 0 ? buffers.input_stride : stride,
                           w + vector * panel_size(depth), depth, x);
    }
    multiply_panel<Rows>(
        h, stride, buffers.layer_weights + layer * buffers.layer_size + vector * panel_size(hidden),
        hidden, sum);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      if (looked_up) {
        const float* row = weights.table + buffers.slots->input[slot + i] * kGates * hidden;
#pragma GCC unroll 8
        for (int g = 0; g < kGates; ++g) x[i][g] = load_columns(row + g * hidden, column, hidden);
      }
      const int64_t n = buffers.slots->row[slot + i] * saved.steps + saved.step;
      Vec out = gru_cell(x[i], sum[i], load(h + i * stride + column), column, hidden,
                         saved.gates ? saved.gates + n * 4 * hidden : nullptr);
      store(next + i * stride + column, out);
      if (saved.output) store_columns(saved.output + n * hidden, column, hidden, out);
    }
  }
};

struct HeadTile {
  const DecoderWeights& weights;
  const Buffers& buffers;
  const float* h;  // [rows][state_stride]

  template <int Rows>
  void run(int64_t panel, int64_t row) const {
    const int64_t hidden = weights.shape.hidden;
    Vec sum[Rows][kGates];
    multiply_panel<Rows>(h + row * buffers.state_stride, buffers.state_stride,
                         buffers.head + panel * panel_size(hidden), hidden, sum);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float* logits = buffers.logits + (row + i) * buffers.logits_stride;
#pragma GCC unroll 8
      for (int v = 0; v < kGates; ++v) store(logits + (panel * kGates + v) * kLanes, sum[i][v]);
    }
  }
};

struct TableTile {
  const DecoderWeights& weights;
  const float* rows;
  float* table;

  template <int Rows>
  void run(int64_t vector, int64_t row) const {
    const int64_t hidden = weights.shape.hidden, depth = weights.shape.embedding_dim;
    Vec sum[Rows][kGates];
    multiply_panel<Rows>(rows + row * depth, depth, weights.packed + vector * panel_size(depth),
                         depth, sum);
    for (int i = 0; i < Rows; ++i) {
      for (int g = 0; g < kGates; ++g) {
        store_columns(table + ((row + i) * kGates + g) * hidden, vector * kLanes, hidden,
                      sum[i][g]);
      }
    }
  }
};

FASTLM_INLINE void copy(float* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// the token that a slot reads next, and its embedding unless the table has its projection
FASTLM_INLINE void set_input(const DecoderWeights& w, const Buffers& b, int64_t slot,
                             int64_t token) {
  b.slots->input[slot] = token;
  if (w.table) return;
  const int64_t size = w.shape.embedding_dim;
  copy(b.x + slot * b.input_stride, w.embedding + token * size, size);
}

void start_state(const DecoderWeights& w, const Buffers& b, int64_t batch, const float* h0,
                 Range own) {
  const int64_t hidden = w.shape.hidden;
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    for (int64_t l = 0; l < w.shape.layers; ++l) {
      const int64_t at = (l * batch + slot) * b.state_stride;
      const float* from = h0 ? h0 + (l * batch + b.slots->row[slot]) * hidden : nullptr;
      for (int64_t j = 0; j < b.state_stride - kSkew; ++j) {
        b.state[0][at + j] = from && j < hidden ? from[j] : 0.f;
        b.state[1][at + j] = 0.f;
      }
    }
  }
}

void end_state(const DecoderWeights& w, const Buffers& b, int64_t batch, int parity, int64_t slot,
               float* h_n) {
  const int64_t hidden = w.shape.hidden;
  for (int64_t l = 0; l < w.shape.layers; ++l) {
    copy(h_n + (l * batch + b.slots->row[slot]) * hidden,
         b.state[parity] + (l * batch + slot) * b.state_stride, hidden);
  }
}

// Draws or scores token `position` of a slot; true when it was the last one.
bool finish_token(const Generation& a, const Buffers& b, int64_t slot, const float* logits,
                  int64_t position, float* scratch) {
  const int64_t row = b.slots->row[slot], at = row * a.max_new + position;
  Philox draw{};
  if (!a.given)
    draw = philox(uint64_t(a.seed), uint64_t(a.row_ids[row]), uint64_t(a.first_step + position));
  Drawn drawn = draw_token(logits, a.weights.shape.classes, a.sampling, draw,
                           a.given ? a.given[at] : -1, scratch);
  a.logprobs[at] = drawn.logprob;
  a.lengths[row] = position + 1;
  if (a.row_max) {
    const double temperature = a.sampling.temperature > 0 ? a.sampling.temperature : 1;
    a.row_max[at] = float(double(drawn.top) / temperature);
    a.log_sum[at] = float(drawn.log_total);
  }
  const int64_t end = a.given ? a.given_lengths[row] : a.max_new;
  if (!a.given) a.tokens[at] = drawn.token;
  if (drawn.token < 0 || position + 1 == end) return true;
  if (a.stops && a.stops[drawn.token]) return true;
  set_input(a.weights, b, slot, drawn.token);
  return false;
}

// slots [own) after the layers of step t; those before `need` have logits, from slot `first` on
void advance(const Generation& a, const Buffers& b, int64_t t, int64_t first, int64_t need,
             Range own, float* scratch) {
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    const int64_t row = b.slots->row[slot], length = a.prompt_lengths[row];
    bool ended;
    if (slot < need && a.given && a.given_lengths[row] == 0) {
      ended = true;
    } else if (slot < need) {
      ended = finish_token(a, b, slot, b.logits + (slot - first) * b.logits_stride, t + 1 - length,
                           scratch);
    } else {
      // nothing follows a prompt that is only read
      ended = t + 1 == length;
      if (!ended) set_input(a.weights, b, slot, a.prompts[row * a.prompt_stride + t + 1]);
    }
    b.slots->ended[slot] = ended;
    if (ended) __atomic_store_n(&b.slots->ended_step, t, __ATOMIC_RELAXED);
  }
}

// the sequences that go on move up, in their order
void compact(const Generation& a, const Buffers& b, int parity) {
  Slots& slots = *b.slots;
  int64_t kept = 0;
  for (int64_t slot = 0; slot < slots.count; ++slot) {
    if (slots.ended[slot]) {
      end_state(a.weights, b, a.batch, parity, slot, a.h_n);
      continue;
    }
    if (kept != slot) {
      slots.row[kept] = slots.row[slot];
      slots.input[kept] = slots.input[slot];
      copy(b.x + kept * b.input_stride, b.x + slot * b.input_stride, b.input_stride);
      for (int64_t l = 0; l < a.weights.shape.layers; ++l) {
        float* state = b.state[parity] + l * a.batch * b.state_stride;
        copy(state + kept * b.state_stride, state + slot * b.state_stride, b.state_stride);
      }
    }
    ++kept;
  }
  slots.count = kept;
}

// how many slots, the first ones, have read their prompt after step t and want another token
int64_t with_logits(const Generation& a, const Buffers& b, int64_t t) {
  if (a.max_new == 0) return 0;
  int64_t low = 0, high = b.slots->count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (a.prompt_lengths[b.slots->row[middle]] <= t + 1) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

int64_t generation_panels(int64_t rows, bool gates) {
  return gates ? vectors(rows / kGates) : head_panels(rows);
}

void generation_pack(const float* w, const float* bias, int64_t rows, int64_t depth, bool gates,
                     int64_t begin, int64_t end, float* packed) {
  for (int64_t p = begin; p < end; ++p) {
    pack_panel(w, bias, depth, gates ? gate_columns(rows / kGates, p) : class_columns(rows, p),
               packed + p * panel_size(depth));
  }
}

void generation_table(const DecoderWeights& weights, int64_t begin, int64_t end, float* table) {
  const int64_t depth = weights.shape.embedding_dim, width = kGates * weights.shape.hidden;
  for_tiles(vectors(weights.shape.hidden), end - begin, 0, 1,
            TableTile{weights, weights.embedding + begin * depth, table + begin * width});
}

void generation(const Generation& a, Team& team, int rank) {
  const DecoderWeights& w = a.weights;
  const Buffers b = make_buffers(w, a.batch, a.workspace, a.threads);
  const int members = team.size();
  float* scratch = b.scratch + rank * b.scratch_size;
  int round = 0;
  if (rank == 0) {
    b.slots->count = a.batch;
    b.slots->ended_step = -1;
  }
  const Range own = share(a.batch, rank, members);
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    b.slots->row[slot] = a.order[slot];
    set_input(w, b, slot, a.prompts[a.order[slot] * a.prompt_stride]);
  }
  start_state(w, b, a.batch, a.h0, own);
  team.barrier(&round);
  for (int64_t t = 0; b.slots->count > 0; ++t) {
    const int parity = int(t & 1);
    const int64_t count = b.slots->count, need = with_logits(a, b, t);
    const int64_t plane = a.batch * a.steps * w.shape.hidden;
    for (int64_t l = 0; l < w.shape.layers; ++l) {
      Saved saved{a.output ? a.output + l * plane : nullptr,
                  a.gates ? a.gates + 4 * l * plane : nullptr, a.steps, t};
      for_tiles(vectors(w.shape.hidden), count, rank, members,
                LayerTile{w, b, l, a.batch, parity, saved});
      team.barrier(&round);
    }
    const float* h = b.state[1 - parity] + (w.shape.layers - 1) * a.batch * b.state_stride;
    for (int64_t first = 0; first < need; first += b.group) {
      const int64_t rows = need - first < b.group ? need - first : b.group;
      for_tiles(head_panels(w.shape.classes), rows, rank, members,
                HeadTile{w, b, h + first * b.state_stride});
      team.barrier(&round);
      Range part = share(rows, rank, members);
      advance(a, b, t, first, need, {first + part.begin, first + part.end}, scratch);
      // the logits are written again
      if (first + rows < need) team.barrier(&round);
    }
    Range part = share(count - need, rank, members);
    advance(a, b, t, 0, need, {need + part.begin, need + part.end}, scratch);
    team.barrier(&round);
    if (__atomic_load_n(&b.slots->ended_step, __ATOMIC_RELAXED) == t) {
      if (rank == 0) compact(a, b, 1 - parity);
      team.barrier(&round);
    }
  }
}

void generation_step(const GenerationStep& a, Team& team, int rank) {
  const DecoderWeights& w = a.weights;
  const Buffers b = make_buffers(w, a.batch, a.workspace, 1);
  const int members = team.size();
  const int64_t batch = a.batch, classes = w.shape.classes;
  int round = 0;
  const Range own = share(batch, rank, members);
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    b.slots->row[slot] = slot;
    set_input(w, b, slot, a.tokens[slot]);
  }
  start_state(w, b, batch, a.h0, own);
  team.barrier(&round);
  for (int64_t l = 0; l < w.shape.layers; ++l) {
    for_tiles(vectors(w.shape.hidden), batch, rank, members,
              LayerTile{w, b, l, batch, 0, Saved{nullptr, nullptr, 0, 0}});
    team.barrier(&round);
  }
  for (int64_t slot = own.begin; slot < own.end; ++slot) end_state(w, b, batch, 1, slot, a.h_n);
  if (!a.logits) return;
  const float* h = b.state[1] + (w.shape.layers - 1) * batch * b.state_stride;
  for (int64_t first = 0; first < batch; first += b.group) {
    const int64_t rows = batch - first < b.group ? batch - first : b.group;
    for_tiles(head_panels(classes), rows, rank, members,
              HeadTile{w, b, h + first * b.state_stride});
    team.barrier(&round);
    const Range part = share(rows, rank, members);
    for (int64_t i = part.begin; i < part.end; ++i) {
      copy(a.logits + (first + i) * classes, b.logits + i * b.logits_stride, classes);
    }
    team.barrier(&round);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
