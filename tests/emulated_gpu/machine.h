// What the scheduler and the instructions of the emulated device share.
#pragma once

#include <ucontext.h>

#include <map>
#include <string>
#include <vector>

#include "emulated_gpu.h"

namespace fastlm {
namespace gpu {

struct Settings {
  uint64_t seed = 1;
  int multiprocessors = 132, shared = 232448;
  int skipped_barrier = -1;  // of each block: for a test of the emulation itself
};
extern Settings settings;
extern std::string failure;

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
extern Grid* grid;

uint64_t draw();
// ends the run; does not come back
void fail(const std::string& what);
// lets others run; wait(): until somebody calls make_ready
void yield();
void wait();
void make_ready(Thread* t);
// after a byte or the arrival has come
void end_phase(Signal& signal);

}  // namespace gpu
}  // namespace fastlm
