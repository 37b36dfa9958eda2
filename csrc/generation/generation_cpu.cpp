// One parallel region a call. A layer's tiles, and the head's, are shared out over columns and
// rows; the threads meet after each of them. Then every slot's next token is drawn, or read from
// its prompt, and its embedding fetched.
#include "common/philox.h"
#include "generation/generation.h"
#include "generation/generation_tiles.h"
#include "sampling/sampling_row.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// the token that a slot reads next, and its embedding unless the table has its projection
FASTLM_INLINE void set_input(const DecoderWeights& w, const Buffers& b, int64_t slot,
                             int64_t token) {
  b.input[slot] = token;
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
      const float* from = h0 ? h0 + (l * batch + b.row[slot]) * hidden : nullptr;
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
    copy(h_n + (l * batch + b.row[slot]) * hidden,
         b.state[parity] + (l * batch + slot) * b.state_stride, hidden);
  }
}

void penalise(const Penalties& penalties, const int32_t* seen, const float* logits, int64_t classes,
              float* result) {
  const float repetition = float(penalties.repetition), presence = float(penalties.presence),
              frequency = float(penalties.frequency);
  for (int64_t i = 0; i < classes; ++i) {
    const float x = logits[i], made = float(seen[i] >> 1);
    const float y = x < 0 ? x * repetition : x / repetition;
    const float off = (made > 0 ? presence : 0.f) + made * frequency;
    result[i] = (seen[i] != 0 ? y : x) - off;
  }
}

// the token is drawn with penalties; its log-prob is the model's own
Drawn draw_penalised(const Generation& a, const Buffers& b, int64_t row, const float* logits,
                     Philox draw) {
  const int64_t classes = a.weights.shape.classes;
  int32_t* seen = a.seen + row * classes;
  penalise(a.penalties, seen, logits, classes, b.penalised);
  Drawn drawn = draw_token(b.penalised, classes, a.sampling, draw, -1, b.scratch);
  if (drawn.token < 0) return drawn;
  seen[drawn.token] += 2;
  return draw_token(logits, classes, a.sampling, draw, drawn.token, b.scratch);
}

// Draws or scores token `position` of a slot; true when it was the last one.
bool finish_token(const Generation& a, const Buffers& b, int64_t slot, const float* logits,
                  int64_t position) {
  const int64_t row = b.row[slot], at = row * a.max_new + position;
  Philox draw{};
  if (!a.given)
    draw = philox(uint64_t(a.seed), uint64_t(a.row_ids[row]), uint64_t(a.first_step + position));
  Drawn drawn = a.seen ? draw_penalised(a, b, row, logits, draw)
                       : draw_token(logits, a.weights.shape.classes, a.sampling, draw,
                                    a.given ? a.given[at] : -1, b.scratch);
  a.logprobs[at] = drawn.softmax.logprob;
  a.lengths[row] = position + 1;
  if (a.row_max) {
    a.row_max[at] = float(drawn.softmax.max);
    a.log_sum[at] = float(drawn.softmax.log_sum);
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
             Range own) {
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    const int64_t row = b.row[slot], length = a.prompt_lengths[row];
    bool ended;
    if (slot < need && a.given && a.given_lengths[row] == 0) {
      ended = true;
    } else if (slot < need) {
      ended = finish_token(a, b, slot, b.logits + (slot - first) * b.logits_stride, t + 1 - length);
    } else {
      // nothing follows a prompt that is only read
      ended = t + 1 == length;
      if (!ended) set_input(a.weights, b, slot, a.prompts[row * a.prompt_stride + t + 1]);
    }
    b.ended[slot] = ended;
    if (ended) __atomic_store_n(&b.shared->ended_step, t, __ATOMIC_RELAXED);
  }
}

// the sequences that go on move up, in their order
void compact(const Generation& a, const Buffers& b, int parity) {
  int64_t kept = 0;
  for (int64_t slot = 0; slot < b.shared->count; ++slot) {
    if (b.ended[slot]) {
      end_state(a.weights, b, a.batch, parity, slot, a.h_n);
      continue;
    }
    if (kept != slot) {
      b.row[kept] = b.row[slot];
      b.input[kept] = b.input[slot];
      copy(b.x + kept * b.input_stride, b.x + slot * b.input_stride, b.input_stride);
      for (int64_t l = 0; l < a.weights.shape.layers; ++l) {
        float* state = b.state[parity] + l * a.batch * b.state_stride;
        copy(state + kept * b.state_stride, state + slot * b.state_stride, b.state_stride);
      }
    }
    ++kept;
  }
  b.shared->count = kept;
}

// how many slots, the first ones, have read their prompt after step t and want another token
int64_t with_logits(const Generation& a, const Buffers& b, int64_t t) {
  if (a.max_new == 0) return 0;
  int64_t low = 0, high = b.shared->count;
  while (low < high) {
    int64_t middle = (low + high) / 2;
    if (a.prompt_lengths[b.row[middle]] <= t + 1) {
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

void generation_pack(const void* w, bool bfloat16, const float* bias, int64_t rows, int64_t depth,
                     bool gates, int64_t begin, int64_t end, float* packed) {
  const int64_t size = panel_size(words_or_floats(depth, bfloat16));
  for (int64_t p = begin; p < end; ++p) {
    pack_any(w, bfloat16, bias, depth,
             gates ? gate_columns(rows / kGates, p) : class_columns(rows, p), packed + p * size);
  }
}

void generation(const Generation& a, Team& team, int rank) {
  const DecoderWeights& w = a.weights;
  Buffers b = make_buffers(w.shape, a.batch, a.workspace, a.threads, rank, a.seen);
  const int members = team.size();
  int round = 0;
  if (rank == 0) {
    b.shared->count = a.batch;
    b.shared->ended_step = -1;
  }
  const Range own = share(a.batch, rank, members);
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    b.row[slot] = a.order[slot];
    set_input(w, b, slot, a.prompts[a.order[slot] * a.prompt_stride]);
  }
  start_state(w, b, a.batch, a.h0, own);
  team.barrier(&round);
  for (int64_t t = 0; b.shared->count > 0; ++t) {
    const int parity = int(t & 1);
    const int64_t count = b.shared->count, need = with_logits(a, b, t);
    const int64_t plane = a.batch * a.steps * w.shape.hidden;
    for (int64_t l = 0; l < w.shape.layers; ++l) {
      Saved saved{a.output ? a.output + l * plane : nullptr,
                  a.gates ? a.gates + 4 * l * plane : nullptr, a.steps, t};
      for_tiles(
          vectors(w.shape.hidden), count, rank, members,
          LayerTile{w, b, input_matrix(w, l), hidden_matrix(w, l), l, a.batch, parity, saved});
      team.barrier(&round);
    }
    const float* h = b.state[1 - parity] + (w.shape.layers - 1) * a.batch * b.state_stride;
    for (int64_t first = 0; first < need; first += b.group) {
      const int64_t rows = need - first < b.group ? need - first : b.group;
      for_tiles(head_panels(w.shape.classes), rows, rank, members,
                HeadTile{head_matrix(w), b, h + first * b.state_stride});
      team.barrier(&round);
      Range part = share(rows, rank, members);
      advance(a, b, t, first, need, {first + part.begin, first + part.end});
      // the logits are written again
      if (first + rows < need) team.barrier(&round);
    }
    Range part = share(count - need, rank, members);
    advance(a, b, t, 0, need, {need + part.begin, need + part.end});
    team.barrier(&round);
    if (__atomic_load_n(&b.shared->ended_step, __ATOMIC_RELAXED) == t) {
      if (rank == 0) compact(a, b, 1 - parity);
      team.barrier(&round);
    }
  }
}

void generation_step(const GenerationStep& a, Team& team, int rank) {
  const DecoderWeights& w = a.weights;
  Buffers b = make_buffers(w.shape, a.batch, a.workspace, a.threads, rank, false);
  const int members = team.size();
  const int64_t batch = a.batch, classes = w.shape.classes;
  int round = 0;
  const Range own = share(batch, rank, members);
  for (int64_t slot = own.begin; slot < own.end; ++slot) {
    b.row[slot] = slot;
    set_input(w, b, slot, a.tokens[slot]);
  }
  start_state(w, b, batch, a.h0, own);
  team.barrier(&round);
  for (int64_t l = 0; l < w.shape.layers; ++l) {
    for_tiles(vectors(w.shape.hidden), batch, rank, members,
              LayerTile{w, b, input_matrix(w, l), hidden_matrix(w, l), l, batch, 0,
                        Saved{nullptr, nullptr, 0, 0}});
    team.barrier(&round);
  }
  for (int64_t slot = own.begin; slot < own.end; ++slot) end_state(w, b, batch, 1, slot, a.h_n);
  if (!a.logits) return;
  const float* h = b.state[1] + (w.shape.layers - 1) * batch * b.state_stride;
  for (int64_t first = 0; first < batch; first += b.group) {
    const int64_t rows = batch - first < b.group ? batch - first : b.group;
    for_tiles(head_panels(classes), rows, rank, members,
              HeadTile{head_matrix(w), b, h + first * b.state_stride});
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
