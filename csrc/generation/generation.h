// Decoding a GRU language model on the CPU: every step of every sequence in one call. Torch-free.
//
//   token -> embedding -> input projection -> GRU layers -> logits -> the next token
//
// Sequences stand in slots, in ascending order of prompt length, all at the same position. So those
// that need logits are always the first ones, and one that has ended leaves its slot.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/threads.h"
#include "sampling/sampling.h"

namespace fastlm {

struct DecoderShape {
  int64_t embedding_dim, hidden, layers;
  int64_t classes;  // rows of the head; 0: none, and nothing is sampled
};

// Where packed, all matrices stand in one array, in panels of embedding_gru_step.h, each padded for
// the widest vectors: w_ih and w_hh of every layer, then the head. Where not, each thread packs a
// panel when it comes to it, which pays when few steps follow.
// Matrices are of float, or packed as words of two bfloat16 (embedding_gru_words.h); all else is
// float, products too.
struct DecoderWeights {
  DecoderShape shape;
  bool bfloat16;        // matrices
  const float* packed;  // generation_packed_size floats, 64-byte aligned, or null
  const int64_t* raw;   // addresses: w_ih, w_hh, b_ih, b_hh of each layer, then those of the head
  const float* embedding;  // [V, D]
  const float* table;      // [V, 3H] input projections, or null: project at every step
};

// On tokens that a sequence has, before temperature and filters.
struct Penalties {
  double repetition;           // a logit above 0 is divided by it, one below multiplied
  double presence, frequency;  // taken from the logit of a token that was made; times how often
};

struct Generation {
  DecoderWeights weights;
  int64_t batch;
  const int64_t* prompts;         // [B, prompt_stride]
  const int64_t* prompt_lengths;  // [B], >= 1
  const int64_t* order;           // [B] rows by ascending prompt length
  int64_t prompt_stride;
  const float* h0;               // [L, B, H] or null: zeros
  const int64_t* given;          // [B, max_new] tokens to score, or null: sample
  const int64_t* given_lengths;  // [B], in [0, max_new]
  const uint8_t* stops;          // [classes] 1: the token ends its sequence; or null
  const int64_t* row_ids;        // [B] row numbers of the draws
  int64_t max_new, seed, first_step;
  SampleOptions sampling;
  Penalties penalties;
  int32_t* seen;  // [B, classes] twice how often a token was made, + 1 if it was read; null: none

  int64_t* tokens;   // [B, max_new], filled by the caller; -1: its row was no distribution
  float* logprobs;   // [B, max_new], filled by the caller
  int64_t* lengths;  // [B] tokens made or scored
  float* h_n;        // [L, B, H] after the last token that was read

  // for a backward, or null
  float* row_max;  // [B, max_new] largest logit / temperature
  float* log_sum;  // [B, max_new] log sum exp(logit / temperature - row_max)
  float* output;   // [L, B, steps, H]
  float* gates;    // [L, B, steps, 4H]: r, z, n, W_hn h + b_hn
  int64_t steps;

  float* workspace;  // generation_workspace floats, 64-byte aligned
  int threads;       // the most members of a team
};

// One token of every sequence, without sampling.
struct GenerationStep {
  DecoderWeights weights;
  int64_t batch;
  const int64_t* tokens;  // [B]
  const float* h0;        // [L, B, H]
  float* h_n;             // [L, B, H]
  float* logits;          // [B, classes], or null
  float* workspace;
  int threads;
};

// padded to the widest vectors, whatever the instruction set
int64_t generation_gates_size(int64_t hidden, int64_t depth, bool bfloat16);
int64_t generation_head_size(int64_t classes, int64_t hidden, bool bfloat16);
int64_t generation_packed_size(const DecoderShape& shape, bool bfloat16);
int64_t generation_workspace(const DecoderShape& shape, int64_t batch, int threads, bool penalties);
// floats of the draw and of a row with penalties, for one thread
int64_t generation_draw_scratch(const DecoderShape& shape, bool penalties);
// floats of one panel of each matrix of a layer, for one thread
int64_t generation_panel_scratch(const DecoderShape& shape);
// rows whose logits are held at once
int64_t generation_group(const DecoderShape& shape, int64_t batch);

// panels [begin, end) of w [rows, depth]; gates: rows = 3H, else classes
FASTLM_PER_ISA(void, generation_pack,
               (const void* w, bool bfloat16, const float* bias, int64_t rows, int64_t depth,
                bool gates, int64_t begin, int64_t end, float* packed))
FASTLM_PER_ISA(int64_t, generation_panels, (int64_t rows, bool gates))
FASTLM_PER_ISA(void, generation, (const Generation& args, Team& team, int rank))
FASTLM_PER_ISA(void, generation_step, (const GenerationStep& args, Team& team, int rank))

}  // namespace fastlm
