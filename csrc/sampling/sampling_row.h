// One row of logits: its softmax, thresholds and inverse CDF. Include in *_cpu.cpp only.
//
// The log-prob is that of `row_statistics`, to the bit.
//
// All filters keep the tokens at or above some logit, so a row needs one threshold. The
// distribution is never stored: sums of 256 exponentials are, the block that holds the draw is
// found from them, and only that block is computed again.
#pragma once

#include <cstdint>

#include "common/philox.h"
#include "common/vec.h"
#include "row_statistics/row_statistics_sums.h"
#include "sampling/sampling.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// unsigned integers in the order of the floats
FASTLM_INLINE uint32_t ordered(float x) {
  union {
    float f;
    uint32_t u;
  } v{x};
  return v.u ^ ((v.u >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
FASTLM_INLINE float from_ordered(uint32_t key) {
  union {
    uint32_t u;
    float f;
  } v{key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu)};
  return v.f;
}

// the largest value t such that the weights of all values >= t sum to `target` or more; the
// smallest value when none does. Radix selection by 11 + 11 + 10 bits; overwrites its arrays.
float select(float* values, float* weights, int64_t count, double target) {
  constexpr int kShift[3] = {21, 10, 0};
  constexpr int kBins[3] = {2048, 2048, 1024};
  double mass[2048];
  double above = 0;
  uint32_t prefix = 0;
  for (int level = 0; level < 3; ++level) {
    int shift = kShift[level], bins = kBins[level];
    for (int bin = 0; bin < bins; ++bin) mass[bin] = 0;
    for (int64_t i = 0; i < count; ++i)
      mass[(ordered(values[i]) >> shift) & (bins - 1)] += double(weights[i]);
    int chosen = 0;
    double chosen_above = above;
    for (int bin = bins - 1; bin >= 0; --bin) {
      if (!(mass[bin] > 0)) continue;
      chosen = bin;
      chosen_above = above;
      above += mass[bin];
      if (above >= target) break;
    }
    above = chosen_above;
    prefix |= uint32_t(chosen) << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      values[kept] = values[i];
      weights[kept] = weights[i];
      kept += int((ordered(values[i]) >> shift) & (bins - 1)) == chosen;
    }
    count = kept;
  }
  return from_ordered(prefix);
}

// the smallest float that is not below x
float round_up(double x) {
  float f = float(x);
  return double(f) < x ? from_ordered(ordered(f) + 1) : f;
}

// what the log-prob of a token is made of
struct Softmax {
  double max, log_sum;  // of z, the logits over the temperature; of exp(z - max)
  float logprob;        // in nats; NaN where the row is no distribution
};

template <typename T>
Softmax softmax_of(const RowSums& row, T logit, double temperature) {
  const Scores<false> scores(float(1 / temperature), 0.f);
  const double log_sum = __builtin_log(row.sum);
  return {row.max, log_sum, float(log_probability(scores, logit, row, log_sum))};
}

template <typename T>
Softmax score_token(const T* logits, int64_t classes, double temperature, int64_t token) {
  const Scores<false> scores(float(1 / temperature), 0.f);
  RowSums row;
  for (int64_t at = 0; at < classes; at += kBlock) {
    const int count = int(classes - at < kBlock ? classes - at : kBlock);
    const float top = largest_of(logits + at, count, 1.f);
    add_block<T, false, false, false>(scores, logits + at, nullptr, count, top, &row, WholeRow{});
  }
  return softmax_of(row, logits[token], temperature);
}

struct SampleBlocks {
  static constexpr int kClasses = kSampleBlock;
  static constexpr bool kWanted = true;
  double** next;
  void operator()(Vec part) const { *(*next)++ = double(reduce_add(part)); }
};

template <typename T>
struct Row {
  const T* logits;
  int64_t classes, blocks;
  float top;        // largest logit
  float inverse_t;  // 1 / temperature
  double total;     // sum of exp((logit - top) / temperature) over the row
  RowSums row;      // the row's statistics
  double* sums;     // [blocks] of exp((logit - top) / temperature)
  float* maxima;    // [blocks, kLanes]
  float* values;    // scratch for `select`
  float* weights;

  // `scratch`: sample_scratch(classes) floats
  Row(const T* logits, int64_t classes, double temperature, float* scratch)
      : logits(logits), classes(classes), blocks((classes + kSampleBlock - 1) / kSampleBlock) {
    sums = reinterpret_cast<double*>(scratch);
    maxima = scratch + 2 * blocks;
    values = maxima + blocks * kSampleLanes;
    weights = values + blocks * kSampleBlock;
    // kept in the range of float: neither 0 * inf nor -inf * 0 may appear
    double inverse = 1 / temperature;
    inverse_t = float(inverse > 1e38 ? 1e38 : inverse < 1e-37 ? 1e-37 : inverse);
    find_top();
    total = sum_row(float(inverse));
    // 1 / temperature or logits times it are beyond float
    if (total != total) total = sum_blocks(-kInfinity);
  }

  bool is_distribution() const { return top > -kInfinity && top < kInfinity && total == total; }

  // of the whole row
  Softmax softmax(int64_t token, double temperature) const {
    Softmax found = softmax_of(row, logits[token], temperature);
    if (found.logprob == found.logprob || !is_distribution()) return found;
    const double distance = double(to_float(logits[token])) - double(top);
    found.max = double(top) / temperature;
    found.log_sum = __builtin_log(total);
    found.logprob = float(distance / temperature - found.log_sum);
    return found;
  }

  FASTLM_INLINE Vec at(const T* logits, int64_t i, int64_t classes) {
    if (i + kLanes <= classes) return load(logits + i);
    return load_first(logits + i, int(classes - i), -kInfinity);
  }
  int64_t end(int64_t block) const {
    int64_t stop = (block + 1) * kSampleBlock;
    return stop < classes ? stop : classes;
  }

  void find_top() {
    Vec all = broadcast(-kInfinity);
    for (int64_t block = 0; block < blocks; ++block) {
      Vec m = broadcast(-kInfinity);
      for (int64_t i = block * kSampleBlock, stop = end(block); i < stop; i += kLanes)
        m = max(at(logits, i, classes), m);  // a NaN is passed over here and found in the sum
      store(maxima + block * kLanes, m);
      all = max(m, all);
    }
    top = reduce_max(all);
  }

  // of the classes of a block of `row_statistics`
  float largest_in(int64_t begin) const {
    Vec all = broadcast(-kInfinity);
    const int64_t end = (begin + kBlock) / kSampleBlock;
    for (int64_t block = begin / kSampleBlock; block < (end < blocks ? end : blocks); ++block)
      all = max(load(maxima + block * kLanes), all);
    return reduce_max(all);
  }

  // as `row_statistics` sums, and on the way the sums of blocks relative to the row; returns theirs
  double sum_row(float scale) {
    const Scores<false> scores(scale, 0.f);
    double* sum = sums;
    for (int64_t at = 0; at < classes; at += kBlock) {
      const int count = int(classes - at < kBlock ? classes - at : kBlock);
      const double before = row.max;
      double* first = sum;
      const Block block = add_block<T, false, false, false>(
          scores, logits + at, nullptr, count, largest_in(at), &row, SampleBlocks{&sum});
      if (block.sum == 0) continue;
      // to the largest so far
      double* from = row.max > before ? sums : first;
      double* end = row.max > before ? first : sum;
      const double factor =
          __builtin_exp(row.max > before ? before - row.max : double(block.base) - row.max);
      for (; from < end; ++from) *from *= factor;
    }
    double total = 0;
    for (int64_t i = 0; i < blocks; ++i) total += sums[i];
    return total;
  }

  // sum of the weights of one block at or above the threshold
  double block_sum(int64_t block, float threshold) const {
    Vec sum = {};
    for (int64_t i = block * kSampleBlock, stop = end(block); i < stop; i += kLanes) {
      Vec x = at(logits, i, classes);
      sum += x < threshold ? Vec{} : exp((x - top) * inverse_t);
    }
    return double(reduce_add(sum));
  }

  // returns the sum over the row of what is at or above the threshold
  double sum_blocks(float threshold) {
    double total = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      bool none = reduce_max(load(maxima + block * kLanes)) < threshold;
      sums[block] = none ? 0 : block_sum(block, threshold);
      total += sums[block];
    }
    return total;
  }

  // copies the logits >= bound, in order, to `values`
  int64_t collect(float bound) {
    int64_t count = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      if (reduce_max(load(maxima + block * kLanes)) < bound) continue;
      for (int64_t i = block * kSampleBlock, stop = end(block); i < stop; ++i) {
        float x = to_float(logits[i]);
        values[count] = x;
        count += x >= bound;
      }
    }
    return count;
  }

  float top_k_threshold(int64_t k) {
    // each lane of each block is one group of logits: the k-th largest of their maxima is a lower
    // bound of the k-th largest logit, and few logits pass it
    float bound = -kInfinity;
    int64_t groups = blocks * kLanes;
    if (groups >= k) {
      for (int64_t i = 0; i < groups; ++i) values[i] = maxima[i];
      for (int64_t i = 0; i < groups; ++i) weights[i] = 1;
      bound = select(values, weights, groups, double(k));
    }
    int64_t count = collect(bound);
    for (int64_t i = 0; i < count; ++i) weights[i] = 1;
    return select(values, weights, count, double(k));
  }

  float top_p_threshold(double p, double temperature, float threshold, double kept) {
    // the tokens below (1 - p) * kept / classes weigh less than 1 - p together: never needed
    double least = 0.999 * (1 - p) * kept / double(classes);
    float bound = float(double(top) + temperature * __builtin_log(least) - 1e-3 * temperature);
    // rounding to float may only let more logits through
    if (bound > -kInfinity) bound = from_ordered(ordered(bound) - 1);
    int64_t count = collect(bound > threshold ? bound : threshold);
    for (int64_t i = count; i % kLanes != 0; ++i) values[i] = -kInfinity;
    for (int64_t i = 0; i < count; i += kLanes)
      store(weights + i, exp((load(values + i) - top) * inverse_t));
    return select(values, weights, count, p * kept);
  }

  // the first token whose cumulative weight exceeds u times the sum
  int64_t choose(double u, float threshold, double kept) const {
    double target = u * kept, before = 0;
    int64_t block = 0, last = 0;
    for (; block < blocks; ++block) {
      if (sums[block] > 0) last = block;
      if (before + sums[block] > target) break;
      before += sums[block];
    }
    if (block == blocks) {  // not reached with exact sums
      block = last;
      before = target;
    }
    int64_t begin = block * kSampleBlock, stop = end(block), token = begin;
    float weight[kSampleBlock];
    for (int64_t i = begin; i < stop; i += kLanes) {
      Vec x = at(logits, i, classes);
      store(weight + (i - begin), x < threshold ? Vec{} : exp((x - top) * inverse_t));
    }
    // the vector sum of the block may exceed this one by its rounding: then its last token
    for (int64_t i = begin; i < stop; ++i) {
      if (!(weight[i - begin] > 0)) continue;
      token = i;
      before += double(weight[i - begin]);
      if (before > target) break;
    }
    return token;
  }

  int64_t draw(const SampleOptions& options, double u) {
    double temperature = options.temperature, kept = total;
    float threshold = -kInfinity;
    if (options.top_k > 0 && options.top_k < classes) {
      threshold = top_k_threshold(options.top_k);
      kept = sum_blocks(threshold);
    }
    float before = threshold;
    if (options.top_p < 1) threshold = top_p_threshold(options.top_p, temperature, threshold, kept);
    if (options.min_p > 0) {
      float least = round_up(double(top) + temperature * __builtin_log(options.min_p));
      threshold = least > threshold ? least : threshold;
    }
    if (threshold > before) kept = sum_blocks(threshold);
    return choose(u, threshold, kept);
  }

  int64_t first_at_top() const {
    int64_t i = 0;
    while (reduce_max(load(maxima + i * kLanes)) < top) ++i;
    for (i *= kSampleBlock; to_float(logits[i]) != top; ++i) {
    }
    return i;
  }
};

struct Drawn {
  int64_t token;  // -1 where the row is no distribution
  Softmax softmax;
};

// the token to draw, or the one that is given
template <typename T>
__attribute__((noinline)) Drawn draw_token(const T* logits, int64_t classes,
                                           const SampleOptions& options, Philox draw, int64_t given,
                                           float* scratch) {
  const double temperature = options.temperature > 0 ? options.temperature : 1;
  if (given >= 0) {
    const Softmax found = score_token(logits, classes, temperature, given);
    if (found.logprob == found.logprob) return {given, found};
    return {given, Row<T>(logits, classes, temperature, scratch).softmax(given, temperature)};
  }
  Row<T> row(logits, classes, temperature, scratch);
  if (!row.is_distribution()) return {-1, softmax_of(row.row, __builtin_nanf(""), 1)};
  const int64_t token =
      options.temperature > 0 ? row.draw(options, philox_double(draw)) : row.first_at_top();
  return {token, row.softmax(token, temperature)};
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
