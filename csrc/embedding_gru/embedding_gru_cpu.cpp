// One parallel region a call: every thread owns a range of hidden columns, keeps its slab of the
// recurrent weights packed in its own cache, and meets the others once a step.
//
// A tile is kRows batch rows by a few vectors of columns, held in registers over the whole sum.
// Every output element is one chain of fused multiply-adds over k in order, whatever tile it falls
// into, so the result depends neither on the number of threads nor on the batch around a row.
#include "embedding_gru/embedding_gru.h"
#include "embedding_gru/embedding_gru_sequence.h"
#include "embedding_gru/embedding_gru_step.h"
#include "embedding_gru/embedding_gru_words.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// columns of the backward product: as many accumulators again
constexpr int kVectors = 3;
// db_ih and db_hh
constexpr int kBiasSums = 2 * kGates;
// tokens added up in plain float32 before they join the compensated sum over all tokens
constexpr int64_t kBiasTokens = 32;

// w [3H, H] -> per vector of columns: 3 bias vectors, then [k][gate][lane]; columns past H are 0
template <Operands K>
void pack_forward(const GruForward& a, Range own, float* packed) {
  const int64_t hidden = a.shape.hidden;
  for (int64_t v = own.begin; v < own.end; ++v) {
    float* panel = packed + v * panel_size_of<K>(hidden);
    if constexpr (K == Operands::floats) {
      pack_panel(static_cast<const float*>(a.w_hh), a.b_hh, hidden, gate_columns(hidden, v), panel,
                 a.round);
    } else {
      pack_panel_words(static_cast<const BFloat16*>(a.w_hh), a.b_hh, hidden,
                       gate_columns(hidden, v), panel);
    }
  }
}

struct ForwardBuffers {
  const float* packed;  // [vectors][1 + H][3][kLanes]
  float* state[2];      // [B][state_stride], zero past H: the operand of the product
  float* exact;         // [B][state_stride]: the state itself, where the operand is rounded
  int64_t state_stride;
};

FASTLM_INLINE int64_t packed_size(int64_t hidden) { return vectors(hidden) * panel_size(hidden); }

FASTLM_INLINE ForwardBuffers forward_buffers(const GruForward& a) {
  const GruShape& s = a.shape;
  ForwardBuffers b;
  b.state_stride = vectors(s.hidden) * kLanes + kSkew;
  b.packed = a.workspace;
  b.state[0] = a.workspace + packed_size(s.hidden);
  b.state[1] = b.state[0] + s.batch * b.state_stride;
  b.exact = a.round ? b.state[1] + s.batch * b.state_stride : nullptr;
  return b;
}

// what the next step of sequence b starts from
template <Operands K>
FASTLM_INLINE void put_state(const ForwardBuffers& buffers, int64_t parity, int64_t b,
                             int64_t column, Vec h) {
  const int64_t row = b * buffers.state_stride;
  if (buffers.exact) store(buffers.exact + row + column, h);
  // whole vectors: past H the state is 0
  store_operand<K>(buffers.state[parity & 1] + row, column, column + kLanes, buffers.exact, h);
}

// one step of Rows sequences and one vector of hidden units
template <Operands K, int Rows>
void forward_tile(const GruForward& a, const ForwardBuffers& buffers, int64_t step, int64_t row,
                  int64_t vector) {
  const GruShape& s = a.shape;
  const int64_t hidden = s.hidden, column = vector * kLanes;
  const int64_t t = s.reverse ? s.steps - 1 - step : step;
  const int64_t stride = buffers.state_stride;
  const float* h = buffers.state[step & 1] + row * stride;
  // of the own columns, so that no other thread waits for it
  const float* exact = buffers.exact ? buffers.exact + row * stride : h;

  Vec sum[Rows][kGates];
  multiply_panel_of<K, Rows>(h, stride, buffers.packed + vector * panel_size_of<K>(hidden), hidden,
                             sum);

#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
    const int64_t n = token(s, row + i, t);
    const float* x = a.table + (a.index ? a.index[n] : n) * kGates * hidden;
    const Vec from_input[kGates] = {load_columns(x, column, hidden),
                                    load_columns(x + hidden, column, hidden),
                                    load_columns(x + 2 * hidden, column, hidden)};
    Vec out = gru_cell(from_input, sum[i], load(exact + i * stride + column), column, hidden,
                       a.gates ? a.gates + n * 4 * hidden : nullptr);
    store_columns(a.out + n * hidden, column, hidden, out);
    if (t == last_step(s, row + i)) {
      store_columns(a.h_n + (row + i) * hidden, column, hidden, out);
    } else {
      // nothing is passed on to a token that begins a document
      bool starts = a.reset && a.reset[token(s, row + i, s.reverse ? t - 1 : t + 1)];
      put_state<K>(buffers, step + 1, row + i, column, starts ? Vec{} : out);
    }
  }
}

template <typename Tile>
FASTLM_INLINE void for_row_tiles(int64_t batch, const Tile& tile) {
  int64_t row = 0;
  for (; row + kRows <= batch; row += kRows) tile.template run<kRows>(row);
  if (kRows == 8 && batch - row >= 4) {
    tile.template run<4>(row);
    row += 4;
  }
  if (batch - row >= 2) {
    tile.template run<2>(row);
    row += 2;
  }
  if (batch - row == 1) tile.template run<1>(row);
}

template <Operands K>
struct ForwardTile {
  const GruForward& args;
  const ForwardBuffers& buffers;
  int64_t step, vector;
  template <int Rows>
  void run(int64_t row) const {
    forward_tile<K, Rows>(args, buffers, step, row, vector);
  }
};

// w [3H, H] -> per vector of columns [k < 3H][lane], the vectors of one panel side by side
template <Operands K, int Width>
void pack_backward(const GruBackward& a, int64_t vector, float* panel) {
  const int64_t hidden = a.shape.hidden, depth = kGates * hidden;
  const int64_t count = K == Operands::floats ? depth : words_of(depth);
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < Width; ++v) {
      const int64_t column = (vector + v) * kLanes;
      Vec row;
      if constexpr (K == Operands::floats) {
        row = load_columns(static_cast<const float*>(a.w_hh) + k * hidden, column, hidden);
        if (a.round) row = nearest_bfloat16(row);
      } else {
        const BFloat16* low = static_cast<const BFloat16*>(a.w_hh) + 2 * k * hidden;
        row = words(load_columns(low, column, hidden),
                    2 * k + 1 < depth ? load_columns(low + hidden, column, hidden) : Vec{});
      }
      store(panel + (k * Width + v) * kLanes, row);
    }
  }
}

// floats of one vector of columns
template <Operands K>
FASTLM_INLINE int64_t backward_panel(int64_t hidden) {
  return kLanes * (K == Operands::floats ? kGates * hidden : words_of(kGates * hidden));
}

struct BackwardBuffers {
  float* packed;    // [vectors * kLanes][3H] floats, in panels
  float* dgate[2];  // [B][gate_stride]: dr, dz, dn * r of one step
  float* carry;     // [B][state_stride]: gradient of the state
  float* bias;      // [kBiasSums][width]: bias gradients of the last few steps
  float* lost;      // [kBiasSums][width]: what rounding took from dbias so far
  int64_t gate_stride, state_stride, width;
};

FASTLM_INLINE BackwardBuffers backward_buffers(const GruShape& s, float* workspace) {
  int64_t count = vectors(s.hidden);
  BackwardBuffers b;
  b.gate_stride = kGates * count * kLanes + kSkew;
  b.width = count * kLanes;
  b.state_stride = b.width + kSkew;
  b.packed = workspace;
  b.dgate[0] = b.packed + b.width * kGates * s.hidden;
  b.dgate[1] = b.dgate[0] + s.batch * b.gate_stride;
  b.carry = b.dgate[1] + s.batch * b.gate_stride;
  b.bias = b.carry + s.batch * b.state_stride;
  b.lost = b.bias + kBiasSums * b.width;
  return b;
}

// gradients of the gates of one token, and what reaches the state directly through z
template <Operands K>
void gate_gradients(const GruBackward& a, const BackwardBuffers& buffers, int64_t step, int64_t b,
                    Range own) {
  const GruShape& s = a.shape;
  const int64_t hidden = s.hidden;
  const int64_t t = s.reverse ? s.steps - 1 - step : step;
  const int64_t n = token(s, b, t);
  const float* previous = a.h0 ? a.h0 + b * hidden : nullptr;
  if (t != first_step(s, b)) previous = a.out + token(s, b, s.reverse ? t + 1 : t - 1) * hidden;
  if (a.reset && a.reset[n]) previous = nullptr;
  const float* gates = a.gates + n * 4 * hidden;
  float* carry = buffers.carry + b * buffers.state_stride;
  float* scratch = buffers.dgate[step & 1] + b * buffers.gate_stride;
  float* dgates = a.dhidden_gates + n * kGates * hidden;
  float* dtable = a.dtable + (a.index ? a.index[n] : n) * kGates * hidden;
  for (int64_t v = own.begin; v < own.end; ++v) {
    const int64_t j = v * kLanes;
    Vec r = load_columns(gates, j, hidden), z = load_columns(gates + hidden, j, hidden);
    Vec c = load_columns(gates + 2 * hidden, j, hidden);
    Vec hn = load_columns(gates + 3 * hidden, j, hidden);
    Vec h = previous ? load_columns(previous, j, hidden) : Vec{};
    Vec d = load(carry + j);
    if (a.dout) d += load_columns(a.dout + n * hidden, j, hidden);
    Vec dn = d * (1.f - z) * (1.f - c * c);
    Vec dz = d * (h - c) * z * (1.f - z);
    Vec dr = dn * hn * r * (1.f - r);
    Vec dnr = dn * r;
    store(carry + j, d * z);
    store_operand<K>(scratch, j, hidden, a.round, dr);
    store_operand<K>(scratch, j + hidden, hidden + hidden, a.round, dz);
    store_operand<K>(scratch, j + 2 * hidden, hidden + 2 * hidden, a.round, dnr);
    store_columns(dgates, j, hidden, dr);
    store_columns(dgates + hidden, j, hidden, dz);
    store_columns(dgates + 2 * hidden, j, hidden, dnr);
    const Vec to_input[kGates] = {dr, dz, dn}, to_hidden[kGates] = {dr, dz, dnr};
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) {
      Vec old = a.index ? load_columns(dtable + g * hidden, j, hidden) : Vec{};
      store_columns(dtable + g * hidden, j, hidden, old + to_input[g]);
      float* sums = buffers.bias + g * buffers.width + j;
      store(sums, load(sums) + to_input[g]);
      sums += kGates * buffers.width;
      store(sums, load(sums) + to_hidden[g]);
    }
  }
}

// moves the sums of the last steps into dbias (Kahan), and starts them afresh
void add_bias(const GruBackward& a, const BackwardBuffers& buffers, Range own) {
  const int64_t hidden = a.shape.hidden;
  for (int g = 0; g < kBiasSums; ++g) {
    for (int64_t v = own.begin; v < own.end; ++v) {
      const int64_t j = v * kLanes;
      float* recent = buffers.bias + g * buffers.width + j;
      float* lost = buffers.lost + g * buffers.width + j;
      Vec total = load_columns(a.dbias + g * hidden, j, hidden);
      Vec term = load(recent) - load(lost);
      Vec sum = total + term;
      store(lost, (sum - total) - term);
      store(recent, Vec{});
      store_columns(a.dbias + g * hidden, j, hidden, sum);
    }
  }
}

// carry[rows][columns] += dgate[rows][3H] W_hh[3H][columns]
template <Operands K, int Width>
struct BackwardTile {
  const GruBackward& args;
  const BackwardBuffers& buffers;
  int64_t step, vector;

  template <int Rows>
  void run(int64_t row) const {
    const GruShape& s = args.shape;
    const int64_t t = s.reverse ? s.steps - 1 - step : step;
    Vec sum[Rows][Width] = {};
    multiply_of<K, Rows, Width>(
        buffers.dgate[step & 1] + row * buffers.gate_stride, buffers.gate_stride,
        buffers.packed + vector * backward_panel<K>(s.hidden), kGates * s.hidden, sum);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      float* carry = buffers.carry + (row + i) * buffers.state_stride + vector * kLanes;
      const bool starts = args.reset && args.reset[token(s, row + i, t)];
#pragma GCC unroll 8
      for (int v = 0; v < Width; ++v) {
        // nothing flows back past the start of a document
        store(carry + v * kLanes, starts ? Vec{} : load(carry + v * kLanes) + sum[i][v]);
      }
    }
  }
};

// action.run<Width>(vector) for the panels of a range
template <typename Action>
FASTLM_INLINE void for_panels(Range own, const Action& action) {
  int64_t v = own.begin;
  for (; v + kVectors <= own.end; v += kVectors) action.template run<kVectors>(v);
  if (own.end - v == 2) action.template run<2>(v);
  if (own.end - v == 1) action.template run<1>(v);
}

template <Operands K>
struct PackPanel {
  const GruBackward& args;
  const BackwardBuffers& buffers;
  template <int Width>
  void run(int64_t vector) const {
    pack_backward<K, Width>(args, vector,
                            buffers.packed + vector * backward_panel<K>(args.shape.hidden));
  }
};

template <Operands K>
struct MultiplyPanel {
  const GruBackward& args;
  const BackwardBuffers& buffers;
  int64_t step;
  template <int Width>
  void run(int64_t vector) const {
    const GruShape& s = args.shape;
    const int64_t t = s.reverse ? s.steps - 1 - step : step;
    for_row_tiles(active(s, t), BackwardTile<K, Width>{args, buffers, step, vector});
  }
};

// the state every sequence starts from, where its first step will look for it
template <Operands K>
void start_states(const GruForward& a, const ForwardBuffers& buffers, Range own) {
  const GruShape& s = a.shape;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t first = first_step(s, b);
    const bool empty = length(s, b) == 0;
    const bool starts = !empty && a.reset && a.reset[token(s, b, first)];
    for (int64_t v = own.begin; v < own.end; ++v) {
      const int64_t column = v * kLanes;
      Vec h = a.h0 && !starts ? load_columns(a.h0 + b * s.hidden, column, s.hidden) : Vec{};
      put_state<K>(buffers, s.reverse ? s.steps - 1 - first : first, b, column, h);
      if (empty) store_columns(a.h_n + b * s.hidden, column, s.hidden, h);
    }
  }
}

template <Operands K>
void run_forward(const GruForward& a, Team& team, int rank) {
  const GruShape& s = a.shape;
  const ForwardBuffers buffers = forward_buffers(a);
  const Range own = share(vectors(s.hidden), rank, team.size());
  int round = 0;
  pack_forward<K>(a, own, a.workspace);
  start_states<K>(a, buffers, own);
  for (int64_t step = 0; step < s.steps; ++step) {
    // the state is double-buffered: who is past this barrier writes what nobody reads any more
    team.barrier(&round);
    const int64_t rows = active(s, s.reverse ? s.steps - 1 - step : step);
    for (int64_t v = own.begin; v < own.end; ++v) {
      for_row_tiles(rows, ForwardTile<K>{a, buffers, step, v});
    }
  }
}

template <Operands K>
void run_backward(const GruBackward& a, Team& team, int rank) {
  const GruShape& s = a.shape;
  const int64_t hidden = s.hidden;
  const BackwardBuffers buffers = backward_buffers(s, a.workspace);
  const Range own = share(vectors(hidden), rank, team.size());
  int round = 0;
  for_panels(own, PackPanel<K>{a, buffers});
  if (K == Operands::words && rank == 0) {
    // the half of the last word that has no value, where there is one
    for (int64_t i = 0; i < 2 * s.batch; ++i)
      reinterpret_cast<BFloat16*>(buffers.dgate[0] +
                                  i * buffers.gate_stride)[kGates * hidden] = {0};
  }
  for (int64_t v = own.begin; v < own.end; ++v) {
    for (int64_t b = 0; b < s.batch; ++b) {
      Vec d = a.dh_n ? load_columns(a.dh_n + b * hidden, v * kLanes, hidden) : Vec{};
      store(buffers.carry + b * buffers.state_stride + v * kLanes, d);
    }
    for (int g = 0; g < kBiasSums; ++g) {
      store_columns(a.dbias + g * hidden, v * kLanes, hidden, Vec{});
      store(buffers.bias + g * buffers.width + v * kLanes, Vec{});
      store(buffers.lost + g * buffers.width + v * kLanes, Vec{});
    }
  }
  const int64_t every = kBiasTokens > s.batch ? (kBiasTokens + s.batch - 1) / s.batch : 1;
  for (int64_t step = s.steps - 1; step >= 0; --step) {
    const int64_t rows = active(s, s.reverse ? s.steps - 1 - step : step);
    for (int64_t b = 0; b < rows; ++b) gate_gradients<K>(a, buffers, step, b, own);
    if (step % every == 0) add_bias(a, buffers, own);
    // every column of this step's gate gradients is needed; they are double-buffered as well
    team.barrier(&round);
    for_panels(own, MultiplyPanel<K>{a, buffers, step});
  }
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t v = own.begin; v < own.end; ++v) {
      store_columns(a.dh0 + b * hidden, v * kLanes, hidden,
                    load(buffers.carry + b * buffers.state_stride + v * kLanes));
    }
  }
}

}  // namespace

void gru_forward(const GruForward& a, Team& team, int rank) {
  !a.bfloat16 ? run_forward<Operands::floats>(a, team, rank)
  : a.round   ? run_forward<kRounded>(a, team, rank)
              : run_forward<Operands::widened>(a, team, rank);
}

void gru_backward(const GruBackward& a, Team& team, int rank) {
  !a.bfloat16 ? run_backward<Operands::floats>(a, team, rank)
  : a.round   ? run_backward<kRounded>(a, team, rank)
              : run_backward<Operands::widened>(a, team, rank);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
