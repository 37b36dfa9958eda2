// The scheduler behind emulated_gpu.h, and the part of the CUDA runtime that launchers call.
#include <sys/mman.h>

#include <cstring>

#include "machine.h"

namespace fastlm {
namespace gpu {

Settings settings;
std::string failure;
Grid* grid;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuard = 64;              // bytes past shared memory that must not change
constexpr uint32_t kPoison = 0x7fa5a5a5u;  // a NaN, as float and as two bfloat16
constexpr int64_t kMaxIdle = 20'000'000;   // switches without progress: nothing will come

int64_t launches, largest_grid;

}  // namespace

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

namespace {

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

cudaError_t run_blocks(int first, int blocks, int threads, size_t shared, int cluster,
                       const std::function<void()>& body);
}  // namespace

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
