// The scheduler behind emulated_gpu.h.
#include "emulated_gpu.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

namespace fastlm {
namespace gpu {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuard = 64;              // bytes past shared memory that must not change
constexpr uint32_t kPoison = 0x7fa5a5a5u;  // a NaN, as float and as two bfloat16
constexpr int64_t kMaxIdle = 20'000'000;   // switches without progress: nothing will come

struct Settings {
  uint64_t seed = 1;
  int multiprocessors = 132, shared = 232448;
  int skipped_barrier = -1;  // of each block: for a test of the emulation itself
};
Settings settings;
std::string failure;
int64_t launches, largest_grid;

struct Failure {
  std::string what;
};

enum class Op { none, load_matrices, multiply_add, shuffle };

struct Block;
struct Warp {
  int arrived = 0;
  Op op = Op::none;
  uint32_t in[kLanesOfWarp][10], out[kLanesOfWarp][4];
};

struct Thread {
  ucontext_t context;
  Block* block;
  int index, state = 0;  // position in the list of those that can run, or -1
  int barriers = 0;
};

// of an mbarrier that one thread arrives at: bytes that came less those expected, whether it has
// arrived, and how many phases are over
struct Signal {
  int64_t bytes = 0;
  bool arrived = false;
  int phase = 0;
  std::vector<Thread*> waiting;
};

struct Block {
  int index, arrived = 0, rank = 0, left = 0;
  Block* first_of_cluster;
  std::vector<Thread*> in_cluster_barrier;  // of the whole cluster, in its first block
  std::map<uint32_t, Signal> signals;
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
  unsigned char* shared;
};

struct Pending {
  uint32_t* to;
  uint32_t value;
  Block* block = nullptr;  // whose shared memory it is, and the signal that counts it
  uint32_t signal = 0;
};

struct Grid {
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;
  std::vector<Pending> pending;
  std::vector<unsigned char> memory;
  ucontext_t scheduler;
  Thread* current = nullptr;
  const std::function<void()>* body;
  size_t shared_bytes;
  int cluster = 1;
  int finished = 0;
  uint64_t random;
  int64_t idle = 0;
};
Grid* grid;

uint64_t draw() {
  grid->random ^= grid->random << 13;
  grid->random ^= grid->random >> 7;
  grid->random ^= grid->random << 17;
  return grid->random;
}

void fail(const std::string& what) {
  if (failure.empty()) failure = what;
  // back to the scheduler, which gives up
  swapcontext(&grid->current->context, &grid->scheduler);
}

void make_ready(Thread* t) {
  t->state = int(grid->ready.size());
  grid->ready.push_back(t);
}

void leave_ready(Thread* t) {
  Thread* last = grid->ready.back();
  grid->ready[t->state] = last;
  last->state = t->state;
  grid->ready.pop_back();
  t->state = -1;
}

void yield() { swapcontext(&grid->current->context, &grid->scheduler); }

void wait() {
  leave_ready(grid->current);
  yield();
}

// a phase ends when its thread has arrived and all bytes have come
void end_phase(Signal& signal) {
  if (!signal.arrived || signal.bytes != 0) return;
  signal.arrived = false;
  ++signal.phase;
  for (Thread* t : signal.waiting) make_ready(t);
  signal.waiting.clear();
}

void commit_one() {
  size_t i = draw() % grid->pending.size();
  const Pending store = grid->pending[i];
  grid->pending[i] = grid->pending.back();
  grid->pending.pop_back();
  grid->idle = 0;
  if (store.block) {
    if (store.block->left > 0 && failure.empty()) failure = "a store into a block that has left";
    Signal& signal = store.block->signals[store.signal];
    *store.to = store.value;
    signal.bytes += 4;
    end_phase(signal);
  } else {
    *store.to = store.value;
  }
}

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
      c[i][j] = float(sum);
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

void start() {
  Thread* self = grid->current;
  (*grid->body)();
  leave_ready(self);
  ++self->block->left;
  ++grid->finished;
  grid->idle = 0;
  swapcontext(&self->context, &grid->scheduler);
}

void schedule() {
  while (grid->finished < int(grid->threads.size()) && failure.empty()) {
    if (!grid->pending.empty() && draw() % 8 == 0) commit_one();
    if (grid->ready.empty() && !grid->pending.empty()) {
      commit_one();
      continue;
    }
    if (grid->ready.empty()) {
      failure = "all threads wait for each other";
      return;
    }
    if (++grid->idle > kMaxIdle) {
      failure = "threads wait for what nobody writes";
      return;
    }
    grid->current = grid->ready[draw() % grid->ready.size()];
    swapcontext(&grid->scheduler, &grid->current->context);
  }
  while (!grid->pending.empty()) commit_one();
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

constexpr int kRankShift = 24;

uint32_t address_in_block(uint32_t address, int rank) {
  if (rank < 0 || rank >= grid->cluster) fail("a block outside the cluster");
  return address | uint32_t(rank + 1) << kRankShift;
}

Block& remote(uint32_t address) {
  if (address >> kRankShift == 0) fail("an address without a block");
  return *(grid->current->block->first_of_cluster + ((address >> kRankShift) - 1));
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
void store_remote(uint32_t to, uint32_t signal, const uint32_t (&v)[4]) {
  store_words(to, signal, v, 4);
}
void store_remote(uint32_t to, uint32_t signal, float x, float y) {
  const uint32_t v[2] = {bits_of_float(x), bits_of_float(y)};
  store_words(to, signal, v, 2);
}

namespace {
cudaError_t run_blocks(int first, int blocks, int threads, size_t shared, int cluster,
                       const std::function<void()>& body);
}

cudaError_t run_clusters(int blocks, int threads, size_t shared, int cluster,
                         const std::function<void()>& body) {
  ++launches;
  if (blocks % cluster || cluster > 16 || shared > size_t(settings.shared)) {
    return cudaErrorInvalidValue;
  }
  uint64_t random = settings.seed;
  for (int first = 0; first < blocks;) {
    int clusters = 1 + int(random % 3);
    random = random * 6364136223846793005u + 1442695040888963407u;
    random ^= random >> 29;
    int count = blocks - first < clusters * cluster ? blocks - first : clusters * cluster;
    cudaError_t error = run_blocks(first, count, threads, shared, cluster, body);
    if (error != cudaSuccess) return error;
    first += count;
  }
  return cudaSuccess;
}

cudaError_t run_grid(int blocks, int threads, size_t shared, const std::function<void()>& body) {
  ++launches;
  largest_grid = largest_grid < blocks ? blocks : largest_grid;
  // what a cooperative launch checks
  if (blocks > settings.multiprocessors || shared > size_t(settings.shared)) {
    return cudaErrorInvalidValue;
  }
  return run_blocks(0, blocks, threads, shared, 1, body);
}

namespace {

cudaError_t run_blocks(int first, int blocks, int threads, size_t shared, int cluster,
                       const std::function<void()>& body) {
  Grid g;
  grid = &g;
  g.body = &body;
  g.shared_bytes = shared;
  g.cluster = cluster;
  g.random = settings.seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
  const size_t stride = (shared + kGuard + 127) / 128 * 128;
  g.memory.resize(stride * blocks + 128);
  for (size_t i = 0; i + 4 <= g.memory.size(); i += 4) std::memcpy(&g.memory[i], &kPoison, 4);
  auto base = (reinterpret_cast<uintptr_t>(g.memory.data()) + 127) / 128 * 128;
  g.blocks.resize(blocks);
  g.threads.resize(size_t(blocks) * threads);
  const size_t bytes = g.threads.size() * kStackBytes;
  auto* stacks = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (int b = 0; b < blocks; ++b) {
    Block& block = g.blocks[b];
    block.index = first + b;
    block.rank = b % cluster;
    block.first_of_cluster = &g.blocks[b - b % cluster];
    block.warps.resize(threads / kLanesOfWarp);
    block.shared = reinterpret_cast<unsigned char*>(base + stride * b);
    for (int i = 0; i < threads; ++i) {
      Thread& t = g.threads[size_t(b) * threads + i];
      t.block = &block;
      t.index = i;
      block.threads.push_back(&t);
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = stacks + (size_t(b) * threads + i) * kStackBytes;
      t.context.uc_stack.ss_size = kStackBytes;
      t.context.uc_link = nullptr;
      makecontext(&t.context, start, 0);
      make_ready(&t);
    }
  }
  schedule();
  for (Block& block : g.blocks) {
    for (size_t i = 0; i < kGuard; i += 4) {
      if (std::memcmp(block.shared + (shared + 3) / 4 * 4 + i, &kPoison, 4) && failure.empty()) {
        failure = "a write past shared memory";
      }
    }
  }
  munmap(stacks, bytes);
  grid = nullptr;
  return failure.empty() ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

}  // namespace gpu
}  // namespace fastlm

using fastlm::gpu::failure;
using fastlm::gpu::settings;

const char* cudaGetErrorString(cudaError_t) {
  return failure.empty() ? "refused by the emulated device" : failure.c_str();
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount            ? settings.multiprocessors
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? settings.shared
           : attribute == cudaDevAttrComputeCapabilityMajor       ? 9
           : attribute == cudaDevAttrComputeCapabilityMinor       ? 0
                                                                  : 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

extern "C" {
void emulator_set(uint64_t seed, int multiprocessors, int shared, int skipped_barrier) {
  settings = {seed, multiprocessors, shared, skipped_barrier};
  failure.clear();
  fastlm::gpu::launches = fastlm::gpu::largest_grid = 0;
}
const char* emulator_failure() { return failure.c_str(); }
int64_t emulator_launches() { return fastlm::gpu::launches; }
int64_t emulator_largest_grid() { return fastlm::gpu::largest_grid; }
}
