// What a data loader does with token ids. Knows neither torch nor Python.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace fastlm {

// The distinct values of a batch of ids, ascending, and where each stands.
class TokenPlan {
 public:
  // every id in [0, vocabulary); reads them once
  TokenPlan(const int64_t* ids, int64_t count, int64_t vocabulary);

  int64_t unique_size() const { return int64_t(unique_.size()); }

  // unique [U]; inverse [N]: rank of each id, may be `ids` itself; offsets [U + 1] and order [N],
  // both or neither: order[offsets[u]:offsets[u + 1]] are the ascending positions of unique[u]
  void write(const int64_t* ids, int64_t* unique, int64_t* inverse, int64_t* offsets,
             int64_t* order) const;

 private:
  void find_by_marking(const int64_t* ids, int64_t vocabulary);
  void find_by_sorting(const int64_t* ids);

  int64_t count_;
  std::vector<int64_t> unique_;
  std::unique_ptr<int32_t[]> rank_;  // [vocabulary], set where an id occurs; null after sorting
};

// Documents to rows of `capacity` tokens, each to the first row that has room. No length is above
// `capacity`. Writes row and place in the row of each document; returns the number of rows.
int64_t first_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* row,
                  int64_t* start);

}  // namespace fastlm
