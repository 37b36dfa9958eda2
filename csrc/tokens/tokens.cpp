#include "tokens/tokens.h"

#include <algorithm>

namespace fastlm {

TokenPlan::TokenPlan(const int64_t* ids, int64_t count, int64_t vocabulary) : count_(count) {
  // marks are worth their memory, an eighth of a byte per word of the vocabulary, until sorting the
  // batch is cheaper than clearing them
  int64_t words = (vocabulary + 63) / 64;
  if (words > 8 * count + 1024 || count > INT32_MAX) {
    find_by_sorting(ids);
  } else {
    find_by_marking(ids, vocabulary);
  }
}

void TokenPlan::find_by_marking(const int64_t* ids, int64_t vocabulary) {
  std::vector<uint64_t> marks((vocabulary + 63) / 64);
  for (int64_t i = 0; i < count_; ++i) marks[ids[i] >> 6] |= uint64_t(1) << (ids[i] & 63);
  // left as it comes: only the entries of ids that occur are written and read
  rank_.reset(new int32_t[vocabulary]);
  unique_.reserve(std::min(count_, vocabulary));
  for (size_t word = 0; word < marks.size(); ++word) {
    for (uint64_t bits = marks[word]; bits != 0; bits &= bits - 1) {
      int64_t id = int64_t(word) * 64 + __builtin_ctzll(bits);
      rank_[id] = int32_t(unique_.size());
      unique_.push_back(id);
    }
  }
}

void TokenPlan::find_by_sorting(const int64_t* ids) {
  unique_.assign(ids, ids + count_);
  std::sort(unique_.begin(), unique_.end());
  unique_.erase(std::unique(unique_.begin(), unique_.end()), unique_.end());
}

void TokenPlan::write(const int64_t* ids, int64_t* unique, int64_t* inverse, int64_t* offsets,
                      int64_t* order) const {
  std::copy(unique_.begin(), unique_.end(), unique);
  for (int64_t i = 0; i < count_; ++i) {
    inverse[i] = rank_ ? rank_[ids[i]]
                       : std::lower_bound(unique_.begin(), unique_.end(), ids[i]) - unique_.begin();
  }
  if (offsets == nullptr) return;
  // offsets[u + 1] counts u, then holds the next free place of u, and ends where u ends
  const int64_t size = unique_size();
  std::fill_n(offsets, size + 1, 0);
  for (int64_t i = 0; i < count_; ++i) ++offsets[inverse[i] + 1];
  for (int64_t u = 0, begin = 0; u < size; ++u) {
    int64_t occurrences = offsets[u + 1];
    offsets[u + 1] = begin;
    begin += occurrences;
  }
  for (int64_t i = 0; i < count_; ++i) order[offsets[inverse[i] + 1]++] = i;
}

int64_t first_fit(const int64_t* lengths, int64_t count, int64_t capacity, int64_t* row,
                  int64_t* start) {
  // a heap-shaped tree over rows: each node holds the most room below it
  int64_t leaves = 1, rows = 0;
  while (leaves < count) leaves *= 2;
  std::vector<int64_t> room(2 * leaves, capacity);
  for (int64_t i = 0; i < count; ++i) {
    int64_t node = 1;
    while (node < leaves) node = room[2 * node] >= lengths[i] ? 2 * node : 2 * node + 1;
    row[i] = node - leaves;
    start[i] = capacity - room[node];
    rows = std::max(rows, row[i] + 1);
    room[node] -= lengths[i];
    while (node /= 2) room[node] = std::max(room[2 * node], room[2 * node + 1]);
  }
  return rows;
}

}  // namespace fastlm
