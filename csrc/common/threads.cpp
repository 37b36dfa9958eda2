#include "common/threads.h"

#include <chrono>
#include <thread>

namespace fastlm {
namespace {

constexpr int kClosed = 1 << 24;
// spinning is right while every member has a core of its own; yield when one seems not to
constexpr int kSpinsBeforeYield = 1 << 12;
// a sleeping pool thread wakes within tens of microseconds; a busy one is not worth waiting for
constexpr auto kDoorOpen = std::chrono::microseconds(500);

inline void relax(int spins) {
  if (spins > kSpinsBeforeYield) {
    std::this_thread::yield();
  } else {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace

int Team::join(int task, int tasks) {
  if (task != 0) {
    int rank = __atomic_fetch_add(&door_, 1, __ATOMIC_ACQ_REL);
    if (rank >= kClosed) return -1;
    for (int spins = 0; __atomic_load_n(&size_, __ATOMIC_ACQUIRE) == 0; ++spins) relax(spins);
    return rank + 1;
  }
  auto deadline = std::chrono::steady_clock::now() + kDoorOpen;
  for (int spins = 0; __atomic_load_n(&door_, __ATOMIC_ACQUIRE) < tasks - 1; ++spins) {
    if (spins % 64 == 63 && std::chrono::steady_clock::now() > deadline) break;
    relax(spins);
  }
  int others = __atomic_fetch_add(&door_, kClosed, __ATOMIC_ACQ_REL);
  __atomic_store_n(&size_, others + 1, __ATOMIC_RELEASE);
  return 0;
}

void Team::barrier(int* round) {
  int members = size_;
  if (members == 1) return;
  int target = ++*round * members;
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) >= target) return;
  for (int spins = 0; __atomic_load_n(&arrived_, __ATOMIC_ACQUIRE) < target; ++spins) relax(spins);
}

}  // namespace fastlm
