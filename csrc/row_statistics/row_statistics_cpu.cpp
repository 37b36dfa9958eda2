// Row statistics on the CPU. One pass over memory: a row is taken in blocks that stay in the
// first-level cache; each block is read for its maximum, then for its sums relative to that
// maximum, and the block's sums are merged into the row's in double precision. The order is fixed
// by the block size alone, so a row's result depends on nothing but the row.
#include "common/vec.h"
#include "row_statistics/row_statistics.h"

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
  float best = -kInfinity;                  // the largest logit, for argmax
  int64_t argmax = 0;
  bool has_nan = false;

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

// the first of the largest logits, or the first NaN
template <typename T>
void update_argmax(const T* x, int count, float sign, float largest, bool nan, int64_t offset,
                   RowSums* row) {
  bool larger = largest > row->best;
  if (row->has_nan || !(nan || larger)) return;
  if (larger) row->best = largest;
  for (int i = 0; i < count; ++i) {
    float value = to_float(x[i]) * sign;
    // the sums are NaN by infinity or overflow too, and then the largest logit counts
    if (nan && value != value) {
      row->argmax = offset + i;
      row->has_nan = true;
      return;
    }
    if (!larger || value != largest) continue;
    larger = false;
    row->argmax = offset + i;
    if (!nan) return;
  }
}

template <bool kMoments, bool kWeighted>
struct BlockSums {
  Vec sum{}, moment{}, squares{}, weighted{}, mass{};

  // z relative to the block's maximum; lanes outside are not counted
  template <bool kMasked>
  FASTLM_INLINE void add(BlockSums& s, Vec shifted, Vec weight, VecInt inside) {
    Vec e = exp(shifted);
    if (kMasked) e = select(inside, e, Vec{});
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
    Vec e = exp(scores.z(scores.squash(load_first(in_lane + i, n - i, 0.f))) - base);
    rest += select((e < 0.5f) & first_lanes(n - i), e, Vec{});
  }
  return sum + reduce_add(rest);
}

template <typename T, bool kCap, bool kMoments, bool kWeighted>
void add_block(const RowForward& a, const T* x, const float* weight, int count, int64_t offset,
               RowSums* row) {
  using Sums = BlockSums<kMoments, kWeighted>;
  const Scores<kCap> scores(a.scale, a.softcap);
  const float sign = a.scale < 0 ? -1.f : 1.f;
  const float largest = largest_of(x, count, sign);
  // a block of -infinity alone is measured from 0: -inf - -inf would be NaN
  const float base =
      largest == -kInfinity ? 0.f : scores.z(scores.squash(broadcast(largest * sign)))[0];
  const Vec one = broadcast(1.f);
  Sums even, odd;
  int i = 0;
  auto shifted = [&](Vec v) { return scores.z(scores.squash(v)) - base; };
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    // the next block (of this row or the next one) arrives while this one is worked on
    prefetch(x + i + kBlock);
    prefetch(x + i + kBlock + kLanes);
    Vec w0 = kWeighted && weight ? load(weight + i) : one;
    Vec w1 = kWeighted && weight ? load(weight + i + kLanes) : one;
    Sums::template add<false>(even, shifted(load(x + i)), w0, VecInt{});
    Sums::template add<false>(odd, shifted(load(x + i + kLanes)), w1, VecInt{});
  }
  for (; i < count; i += kLanes) {
    int rest = count - i < kLanes ? count - i : kLanes;
    Vec w = kWeighted && weight ? load_first(weight + i, rest, 0.f) : one;
    Sums::template add<true>(even, shifted(load_first(x + i, rest, 0.f)), w, first_lanes(rest));
  }
  Sums block = Sums::join(even, odd);
  const float sum = reduce_add(block.sum);
  // one class has nearly all: beside its 1 the others, and with them the loss, would be rounded off
  const bool certain = sum < kCertain && sum > 0.5f;
  row->merge(base, certain ? 1 + sum_of_rest(scores, x, count, base, even.sum, odd.sum) : sum,
             kMoments ? reduce_add(block.moment) : 0, kMoments ? reduce_add(block.squares) : 0);
  if (kWeighted) {
    double mass = reduce_add(block.mass);
    row->weighted += reduce_add(block.weighted) + mass * base;
    row->mass += mass;
  }
  if (a.argmax) update_argmax(x, count, sign, largest, sum != sum, offset, row);
}

template <typename T>
FASTLM_INLINE void set(T* p, int64_t row, double value) {
  if (p) p[row] = T(value);
}

void skip_row(const RowForward& a, int64_t row) {
  float* outputs[] = {a.max,     a.log_sum, a.lse,          a.logprob,
                      a.entropy, a.sum_sq,  a.weighted_sum, a.weight_mass};
  for (float* p : outputs) set(p, row, 0);
  set(a.argmax, row, -1);
}

template <typename T, bool kCap, bool kMoments, bool kWeighted>
void forward_row(const RowForward& a, int64_t index) {
  if (a.target && a.target[index] == a.ignore_index) return skip_row(a, index);
  const T* x = static_cast<const T*>(a.logits) + index * a.row_stride;
  const float* weight = a.weight ? a.weight + index * a.weight_stride : nullptr;
  float gathered[kBlock];
  RowSums row;
  for (int64_t at = 0; at < a.classes; at += kBlock) {
    int count = int(a.classes - at < kBlock ? a.classes - at : kBlock);
    const float* w = weight ? weight + at : nullptr;
    if (a.class_stride == 1) {
      add_block<T, kCap, kMoments, kWeighted>(a, x + at, w, count, at, &row);
    } else {
      for (int i = 0; i < count; ++i) gathered[i] = to_float(x[(at + i) * a.class_stride]);
      add_block<float, kCap, kMoments, kWeighted>(a, gathered, w, count, at, &row);
    }
  }
  const double log_sum = __builtin_log(row.sum);
  set(a.max, index, row.max);
  set(a.log_sum, index, log_sum);
  set(a.lse, index, row.max + log_sum);
  set(a.entropy, index, log_sum - row.moment / row.sum);
  set(a.sum_sq, index, row.squares / (row.sum * row.sum));
  set(a.weighted_sum, index, row.weighted - row.mass * (row.max + log_sum));
  set(a.weight_mass, index, row.mass);
  set(a.argmax, index, row.argmax);
  if (!a.target) return;
  const int64_t target = a.target[index];
  double logprob = __builtin_nan("");
  if (target >= 0 && target < a.classes) {
    const Scores<kCap> scores(a.scale, a.softcap);
    float value = to_float(x[target * a.class_stride]);
    logprob = double(scores.z(scores.squash(broadcast(value)))[0]) - row.max - log_sum;
  }
  set(a.logprob, index, logprob);
}

template <typename T, bool kCap>
void forward_rows(const RowForward& a, int64_t begin, int64_t end) {
  const bool moments = a.entropy || a.sum_sq;
  for (int64_t row = begin; row < end; ++row) {
    if (moments && a.weighted) {
      forward_row<T, kCap, true, true>(a, row);
    } else if (moments) {
      forward_row<T, kCap, true, false>(a, row);
    } else if (a.weighted) {
      forward_row<T, kCap, false, true>(a, row);
    } else {
      forward_row<T, kCap, false, false>(a, row);
    }
  }
}

struct Coefficients {
  float p, p_log_p, p_squared, weight;
};

template <typename T, bool kCap, bool kGeneral, bool kWeighted>
struct Gradient {
  Scores<kCap> scores;
  Coefficients c;
  float max, log_sum;

  // of the loss with respect to the logits, for a class that is not the target
  FASTLM_INLINE Vec at(const Gradient& g, Vec x, Vec weight) {
    Vec squashed = g.scores.squash(x);
    Vec log_p = (g.scores.z(squashed) - g.max) - g.log_sum;
    Vec p = exp(log_p);
    Vec inner = broadcast(g.c.p);
    if (kGeneral) {
      log_p = select(log_p < kLowest, broadcast(kLowest), log_p);
      inner += g.c.p_log_p * log_p + g.c.p_squared * p;
    }
    Vec dz = p * inner;
    if (kWeighted) dz += g.c.weight * weight;
    return dz * g.scores.slope(squashed);
  }

  // at the target: p * inner + on_target, of which often no more than p - 1 is left
  static __attribute__((noinline)) float at_target(const Gradient& g, float x, float weight,
                                                   float on_target) {
    Vec squashed = g.scores.squash(broadcast(x));
    const double log_p = (double(g.scores.z(squashed)[0]) - g.max) - g.log_sum;
    const double p_minus_1 = __builtin_expm1(log_p);
    double inner = g.c.p;
    if (kGeneral) {
      inner += g.c.p_log_p * (log_p < kLowest ? kLowest : log_p) + g.c.p_squared * (p_minus_1 + 1);
    }
    const float slope = g.scores.slope(squashed)[0];
    // a weight beside it leaves more than p - 1, or exactly nothing of float's own sums
    if (kWeighted)
      return ((float(p_minus_1 + 1) * float(inner) + g.c.weight * weight) + on_target) * slope;
    return float((p_minus_1 * inner + (inner + on_target)) * slope);
  }
};

template <typename T, bool kCap, bool kGeneral, bool kWeighted>
void backward_row(const RowBackward& a, int64_t index, const Coefficients& c, float on_target) {
  using G = Gradient<T, kCap, kGeneral, kWeighted>;
  const G gradient{Scores<kCap>(a.scale, a.softcap), c, a.max[index], a.log_sum[index]};
  const T* x = static_cast<const T*>(a.logits) + index * a.row_stride;
  T* out = static_cast<T*>(a.dlogits) + index * a.classes;
  const float* weight = a.weight ? a.weight + index * a.weight_stride : nullptr;
  const Vec one = broadcast(1.f);
  const int64_t target = a.target ? a.target[index] : -1;
  const bool inside = target >= 0 && target < a.classes;
  // dlogits may overwrite the logits
  const float at_target = inside ? to_float(x[target]) : 0.f;
  int64_t i = 0;
  for (; i + kLanes <= a.classes; i += kLanes)
    store(out + i, G::at(gradient, load(x + i), kWeighted && weight ? load(weight + i) : one));
  if (i < a.classes) {
    int rest = int(a.classes - i);
    Vec w = kWeighted && weight ? load_first(weight + i, rest, 0.f) : one;
    store_first(out + i, G::at(gradient, load_first(x + i, rest, 0.f), w), rest);
  }
  if (!inside) return;
  const float w = kWeighted && weight ? weight[target] : 1.f;
  from_float(G::at_target(gradient, at_target, w, on_target), out + target);
}

FASTLM_INLINE float of_row(const float* coefficient, int64_t row) {
  return coefficient ? coefficient[row] : 0.f;
}

template <typename T, bool kCap>
void backward_rows(const RowBackward& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Coefficients c{of_row(a.on_p, row), of_row(a.on_p_log_p, row),
                         of_row(a.on_p_squared, row), of_row(a.on_weight, row)};
    const float on_target = of_row(a.on_target, row);
    const bool general = c.p_log_p != 0 || c.p_squared != 0;
    const bool zero = c.p == 0 && !general && c.weight == 0 && on_target == 0;
    // a row that holds a NaN has a NaN sum, and its gradient stays NaN, as 0 * NaN is
    const bool finite = a.max[row] - a.max[row] == 0 && a.log_sum[row] - a.log_sum[row] == 0;
    if ((a.target && a.target[row] == a.ignore_index) || (zero && finite)) {
      T* out = static_cast<T*>(a.dlogits) + row * a.classes;
      __builtin_memset(out, 0, int64_t(sizeof(T)) * a.classes);
    } else if (general && c.weight != 0) {
      backward_row<T, kCap, true, true>(a, row, c, on_target);
    } else if (general) {
      backward_row<T, kCap, true, false>(a, row, c, on_target);
    } else if (c.weight != 0) {
      backward_row<T, kCap, false, true>(a, row, c, on_target);
    } else {
      backward_row<T, kCap, false, false>(a, row, c, on_target);
    }
  }
}

}  // namespace

void row_statistics_forward(const RowForward& args, bool bfloat16, int64_t begin, int64_t end) {
  const bool cap = args.softcap != 0;
  auto rows = bfloat16 ? (cap ? forward_rows<BFloat16, true> : forward_rows<BFloat16, false>)
                       : (cap ? forward_rows<float, true> : forward_rows<float, false>);
  rows(args, begin, end);
}

void row_statistics_backward(const RowBackward& args, bool bfloat16, int64_t begin, int64_t end) {
  const bool cap = args.softcap != 0;
  auto rows = bfloat16 ? (cap ? backward_rows<BFloat16, true> : backward_rows<BFloat16, false>)
                       : (cap ? backward_rows<float, true> : backward_rows<float, false>);
  rows(args, begin, end);
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
