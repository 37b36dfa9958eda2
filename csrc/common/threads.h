// Threads for the torch-free kernels. `parallel` in binding.h fills this in with torch's own pool.
#pragma once

#include <cstdint>

namespace fastlm {

// A team of threads inside one parallel region, with a barrier. Threads that arrive before the
// first one closes the door take part; a late one returns at once. So the team works, smaller,
// when the pool is busy or the call is nested in another region, and results must not depend on
// its size.
class Team {
 public:
  int size() const { return size_; }
  // waits for all members; `round` is a counter each member keeps, starting at 0
  void barrier(int* round);

  // called by every task of the region; task 0 is the one that closes the door.
  // Returns the member's rank, or -1 when it came too late.
  int join(int task, int tasks);

 private:
  // one cache line each: the members spin on them
  alignas(64) int door_ = 0;     // members that have joined, plus kClosed once it is shut
  alignas(64) int arrived_ = 0;  // arrivals at barriers, over all rounds
  alignas(64) int size_ = 0;
};

}  // namespace fastlm
