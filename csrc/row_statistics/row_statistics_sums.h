// The sums over one row of logits from which its statistics follow, in an order that depends on the
// row alone: whoever includes this gets the same bits. Include in *_cpu.cpp only.
#pragma once

#include "common/vec.h"
#include "row_statistics/row_statistics_lanes.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int kBlock = 4096;  // 16 KiB of float32
// exp(kLowest) is 0, and 0 * kLowest is 0 where 0 * -infinity would be NaN
constexpr float kLowest = -1e4f;

FASTLM_INLINE VecInt first_lanes(int count) {
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < count;
}

FASTLM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// from logits to z
template <bool kCap>
struct Scores {
  float scale, cap, inverse_cap;
  Scores(float scale, float softcap)
      : scale(scale), cap(softcap), inverse_cap(kCap ? 1.f / softcap : 0.f) {}
  // tanh of the logit, or the logit itself
  Vec squash(Vec x) const { return kCap ? tanh(x * inverse_cap) : x; }
  // rounded, as the largest score is: fused with its subtraction equal logits would differ by the
  // rounding of the largest
  Vec z(Vec squashed) const { return rounded(kCap ? squashed * cap * scale : squashed * scale); }
  // dz/dlogits
  Vec slope(Vec squashed) const {
    return kCap ? scale * (1.f - squashed * squashed) : broadcast(scale);
  }
};

// a sum below this is taken again without the largest: above it float keeps 3 digits of sum - 1
constexpr float kCertain = 1.f + 1.f / 128;

// sums over the row so far
struct RowSums {
  double max = -__builtin_inf();
  double sum = 0, moment = 0, squares = 0;  // of e, e * (z - max), e * e with e = exp(z - max)
  double weighted = 0, mass = 0;            // of weight * z, weight

  void merge(double base, double s, double m, double q) {
    if (s == 0) return;  // nothing but -infinity in the block
    if (sum == 0) {
      max = base, sum = s, moment = m, squares = q;
    } else if (base > max) {
      double shift = max - base, factor = __builtin_exp(shift);
      moment = factor * (moment + shift * sum) + m;
      squares = factor * factor * squares + q;
      sum = factor * sum + s;
      max = base;
    } else {
      double shift = base - max, factor = __builtin_exp(shift);
      moment += factor * (m + shift * s);
      squares += factor * factor * q;
      sum += factor * s;
    }
  }
};

template <bool kMoments, bool kWeighted>
struct BlockSums {
  Vec sum{}, moment{}, squares{}, weighted{}, mass{};

  // z relative to the block's maximum; lanes outside are not counted. Returns exp of it, rounded,
  // so that no caller's sum takes it in more digits than another's.
  template <bool kMasked>
  FASTLM_INLINE Vec add(BlockSums& s, Vec shifted, Vec weight, VecInt inside) {
    Vec e = exp(shifted);
    if (kMasked) e = select(inside, e, Vec{});
    e = rounded(e);
    s.sum += e;
    if (kMoments) {
      s.moment += e * select(shifted < kLowest, broadcast(kLowest), shifted);
      s.squares += e * e;
    }
    if (kWeighted) {
      Vec product = weight * shifted;
      s.weighted += kMasked ? select(inside, product, Vec{}) : product;
      s.mass += kMasked ? select(inside, weight, Vec{}) : weight;
    }
    return e;
  }
  FASTLM_INLINE BlockSums join(const BlockSums& a, const BlockSums& b) {
    return {a.sum + b.sum, a.moment + b.moment, a.squares + b.squares, a.weighted + b.weighted,
            a.mass + b.mass};
  }
};

// sum of exp(z - base) without the largest class, from the sums of `add_block`: only the lane that
// has it is summed again
template <typename T, bool kCap>
__attribute__((noinline)) double sum_of_rest(const Scores<kCap>& scores, const T* x, int count,
                                             float base, Vec even, Vec odd) {
  constexpr int kStep = 2 * kLanes;
  float lanes[kStep], in_lane[kBlock / kStep + 2];
  store(lanes, even);
  store(lanes + kLanes, odd);
  int certain = 0, n = 0;
  double sum = 0;
  for (int i = 0; i < kStep; ++i) {
    if (lanes[i] > 0.5f)
      certain = i;
    else
      sum += lanes[i];
  }
  const int pairs = count / kStep * kStep;
  for (int i = certain; i < pairs; i += kStep) in_lane[n++] = to_float(x[i]);
  if (certain < kLanes)
    for (int i = pairs + certain; i < count; i += kLanes) in_lane[n++] = to_float(x[i]);
  Vec rest{};
  for (int i = 0; i < n; i += kLanes) {
    Vec e = exp(scores.z(scores.squash(load_end(in_lane + i, n - i, 0.f))) - base);
    rest += select((e < 0.5f) & first_lanes(n - i), e, Vec{});
  }
  return sum + sum_of_lanes(rest);
}

// what `add_block` says of a block
struct Block {
  float base;  // largest z, which the sums are relative to
  float sum;
};

// for `add_block`: nothing but the row's sums is wanted
struct WholeRow {
  static constexpr int kClasses = kBlock;
  static constexpr bool kWanted = false;
  void operator()(Vec) const {}
};

FASTLM_INLINE float sign_of(float scale) { return scale < 0 ? -1.f : 1.f; }

// The next `count` <= kBlock classes of a row, with the largest of logits times sign_of(scale).
// parts(sum): lane sums of exp(z - base), after each Parts::kClasses classes and at the end.
template <typename T, bool kCap, bool kMoments, bool kWeighted, typename Parts>
FASTLM_INLINE Block add_block(const Scores<kCap>& scores, const T* x, const float* weight,
                              int count, float largest, RowSums* row, const Parts& parts) {
  using Sums = BlockSums<kMoments, kWeighted>;
  const Vec top = broadcast(largest * sign_of(scores.scale));
  // a block of -infinity alone is measured from 0: -inf - -inf would be NaN
  const float base = largest == -kInfinity ? 0.f : scores.z(scores.squash(top))[0];
  const Vec one = broadcast(1.f);
  Sums even, odd;
  auto shifted = [&](Vec v) { return scores.z(scores.squash(v)) - base; };
  for (int i = 0; i < count;) {
    const int end = count - i < Parts::kClasses ? count : i + Parts::kClasses;
    Vec part{};
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      // the next block (of this row or the next one) arrives while this one is worked on
      prefetch(x + i + kBlock);
      prefetch(x + i + kBlock + kLanes);
      Vec w0 = kWeighted && weight ? load(weight + i) : one;
      Vec w1 = kWeighted && weight ? load(weight + i + kLanes) : one;
      Vec e0 = Sums::template add<false>(even, shifted(load(x + i)), w0, VecInt{});
      Vec e1 = Sums::template add<false>(odd, shifted(load(x + i + kLanes)), w1, VecInt{});
      if (Parts::kWanted) part += e0 + e1;
    }
    for (; i < end; i += kLanes) {
      int rest = count - i < kLanes ? count - i : kLanes;
      Vec w = kWeighted && weight ? load_end(weight + i, rest, 0.f) : one;
      Vec v = shifted(load_end(x + i, rest, 0.f));
      Vec e = Sums::template add<true>(even, v, w, first_lanes(rest));
      if (Parts::kWanted) part += e;
    }
    parts(part);
  }
  Sums block = Sums::join(even, odd);
  const float sum = sum_of_lanes(block.sum);
  // one class has nearly all: beside its 1 the others, and with them the loss, would be rounded off
  const bool certain = sum < kCertain && sum > 0.5f;
  row->merge(base, certain ? 1 + sum_of_rest(scores, x, count, base, even.sum, odd.sum) : sum,
             kMoments ? sum_of_lanes(block.moment) : 0, kMoments ? sum_of_lanes(block.squares) : 0);
  if (kWeighted) {
    double mass = sum_of_lanes(block.mass);
    row->weighted += sum_of_lanes(block.weighted) + mass * base;
    row->mass += mass;
  }
  return {base, sum};
}

// of log p of one class; log_sum: the log of row.sum
template <typename T, bool kCap>
FASTLM_INLINE double log_probability(const Scores<kCap>& scores, T logit, const RowSums& row,
                                     double log_sum) {
  return double(scores.z(scores.squash(broadcast(to_float(logit))))[0]) - row.max - log_sum;
}

}  // namespace
}  // namespace FASTLM_ISA
}  // namespace fastlm
