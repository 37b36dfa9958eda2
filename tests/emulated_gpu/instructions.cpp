// Barriers, operations of warps, and memory, one thread at a time.
#include <cmath>
#include <cstring>

#include "machine.h"

namespace fastlm {
namespace gpu {
namespace {

constexpr int kRankShift = 24;

Warp& warp_of(Thread* t) { return t->block->warps[t->index / kLanesOfWarp]; }

float bfloat16_at(uint32_t v, int half) { return float_of_bits(half ? v & 0xffff0000u : v << 16); }

void compute_matrices(Block& block, Warp& w) {
  for (int m = 0; m < 4; ++m) {
    for (int lane = 0; lane < kLanesOfWarp; ++lane) {
      uint32_t row = w.in[8 * m + lane / 4][0];
      if (row % 16 || row + 16 > grid->shared_bytes) return fail("a matrix outside shared memory");
      std::memcpy(&w.out[lane][m], block.shared + row + lane % 4 * 4, 4);
    }
  }
}

// tensor cores cut the bits that a sum has too many of
float toward_zero(double x) {
  float nearest = float(x);
  return std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.f) : nearest;
}

// operands in the order of the instruction: a 0..3, b 0..1, c 0..3
void compute_product(Warp& w) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    const uint32_t* v = w.in[lane];
    int row = lane / 4, col = lane % 4 * 2;
    for (int e = 0; e < 2; ++e) {
      for (int q = 0; q < 4; ++q) a[row + q % 2 * 8][col + q / 2 * 8 + e] = bfloat16_at(v[q], e);
      for (int q = 0; q < 2; ++q) b[col + q * 8 + e][row] = bfloat16_at(v[4 + q], e);
      for (int q = 0; q < 2; ++q) c[row + q * 8][col + e] = float_of_bits(v[6 + 2 * q + e]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      double sum = c[i][j];
      for (int k = 0; k < 16; ++k) sum += double(a[i][k]) * b[k][j];
      c[i][j] = toward_zero(sum);
    }
  }
  for (int lane = 0; lane < kLanesOfWarp; ++lane) {
    for (int q = 0; q < 4; ++q) {
      w.out[lane][q] = bits_of_float(c[lane / 4 + q / 2 * 8][lane % 4 * 2 + q % 2]);
    }
  }
}

// the last lane to come does it for all
const uint32_t* together(Op op, const uint32_t* in, int count) {
  Thread* self = grid->current;
  Warp& w = warp_of(self);
  int lane = self->index % kLanesOfWarp;
  if (w.arrived > 0 && w.op != op) fail("lanes of a warp in different operations");
  w.op = op;
  std::memcpy(w.in[lane], in, count * 4);
  if (++w.arrived < kLanesOfWarp) {
    wait();
    return w.out[lane];
  }
  if (op == Op::load_matrices) compute_matrices(*self->block, w);
  if (op == Op::multiply_add) compute_product(w);
  if (op == Op::shuffle) {
    for (int i = 0; i < kLanesOfWarp; ++i) w.out[i][0] = w.in[w.in[i][1] % kLanesOfWarp][0];
  }
  w.arrived = 0;
  grid->idle = 0;
  int first = self->index - lane;
  for (int i = 0; i < kLanesOfWarp; ++i) {
    if (i != lane) make_ready(self->block->threads[first + i]);
  }
  return w.out[lane];
}

Block& remote(uint32_t address) {
  if (address >> kRankShift == 0) fail("an address without a block");
  return *(grid->current->block->first_of_cluster + ((address >> kRankShift) - 1));
}

void store_words(uint32_t to, uint32_t signal, const uint32_t* v, int count) {
  const uint32_t mask = (1u << kRankShift) - 1;
  Block& block = remote(to);
  if (&block != &remote(signal)) fail("a signal of another block");
  if (!block.signals.count(signal & mask)) fail("a signal that was not started");
  if (to % (4 * count) || (to & mask) + 4 * count > grid->shared_bytes) {
    fail("a store outside shared memory");
  }
  for (int i = 0; i < count; ++i) {
    auto* p = reinterpret_cast<uint32_t*>(block.shared + (to & mask)) + i;
    grid->pending.push_back({p, v[i], &block, signal & mask});
  }
}

}  // namespace

int thread_index() { return grid->current->index; }
int block_index() { return grid->current->block->index; }
void stop() {
  fail("the kernel stopped itself");
  __builtin_unreachable();
}
unsigned char* dynamic_shared() { return grid->current->block->shared; }
uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - grid->current->block->shared);
}

void barrier() {
  Thread* self = grid->current;
  Block& block = *self->block;
  if (self->barriers++ == settings.skipped_barrier) return yield();
  if (++block.arrived < int(block.threads.size())) return wait();
  block.arrived = 0;
  grid->idle = 0;
  for (Thread* t : block.threads) {
    if (t != self) make_ready(t);
  }
  yield();
}

uint4 load_relaxed(const void* p) {
  const auto* from = static_cast<const volatile uint32_t*>(p);
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a vector that is not aligned");
  uint32_t v[4];
  yield();
  for (int i : {2, 0, 3, 1}) {
    v[i] = from[i];
    if (draw() % 16 == 0) yield();
  }
  return {v[0], v[1], v[2], v[3]};
}
void store_relaxed(void* p, uint32_t v) {
  if (reinterpret_cast<uintptr_t>(p) % 4) fail("a word that is not aligned");
  grid->pending.push_back({static_cast<uint32_t*>(p), v});
}
void store_relaxed(void* p, uint32_t x, uint32_t y) {
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("a vector that is not aligned");
  store_relaxed(p, x);
  store_relaxed(static_cast<uint32_t*>(p) + 1, y);
}

void load_matrices(uint32_t address, uint32_t (&m)[4]) {
  std::memcpy(m, together(Op::load_matrices, &address, 1), 16);
}
void load_shared(uint32_t address, uint32_t (&v)[4]) {
  if (address % 16 || address + 16 > grid->shared_bytes) fail("a vector outside shared memory");
  std::memcpy(v, grid->current->block->shared + address, 16);
}
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(in + 6, c, 16);
  std::memcpy(c, together(Op::multiply_add, in, 10), 16);
}
uint32_t shuffle(uint32_t v, int lane) {
  uint32_t in[2] = {v, uint32_t(lane)};
  return together(Op::shuffle, in, 2)[0];
}

uint32_t pack_bfloat16(float low, float high) {
  auto half = [](float x) -> uint32_t {
    if (x != x) return 0x7fff;
    uint32_t v = bits_of_float(x);
    return (v + 0x7fff + (v >> 16 & 1)) >> 16;
  };
  return half(high) << 16 | half(low);
}

int cluster_rank() { return grid->current->block->rank; }
int cluster_size() { return grid->cluster; }

void cluster_barrier() {
  Thread* self = grid->current;
  auto& there = self->block->first_of_cluster->in_cluster_barrier;
  there.push_back(self);
  if (there.size() < self->block->threads.size() * grid->cluster) return wait();
  grid->idle = 0;
  for (Thread* t : there) {
    if (t != self) make_ready(t);
  }
  there.clear();
  yield();
}

uint32_t address_in_block(uint32_t address, int rank) {
  if (rank < 0 || rank >= grid->cluster) fail("a block outside the cluster");
  return address | uint32_t(rank + 1) << kRankShift;
}

void signal_start(uint32_t signal) {
  if (signal % 8 || signal + 8 > grid->shared_bytes) fail("a signal outside shared memory");
  grid->current->block->signals[signal];
}
void signal_expect(uint32_t signal, int bytes) {
  Block& block = *grid->current->block;
  if (!block.signals.count(signal)) fail("a signal that was not started");
  Signal& s = block.signals[signal];
  if (s.arrived) fail("a second arrival in one phase");
  s.arrived = true;
  s.bytes -= bytes;
  end_phase(s);
  yield();
}
void signal_wait(uint32_t signal, int parity) {
  Block& block = *grid->current->block;
  if (!block.signals.count(signal)) fail("a signal that was not started");
  Signal& s = block.signals[signal];
  yield();
  // done when the phase of that parity is not the current one
  while ((s.phase & 1) == parity) {
    s.waiting.push_back(grid->current);
    wait();
  }
  grid->idle = 0;
}

void store_remote(uint32_t to, uint32_t signal, const uint32_t (&v)[4]) {
  store_words(to, signal, v, 4);
}
void store_remote(uint32_t to, uint32_t signal, float x, float y) {
  const uint32_t v[2] = {bits_of_float(x), bits_of_float(y)};
  store_words(to, signal, v, 2);
}

}  // namespace gpu
}  // namespace fastlm
