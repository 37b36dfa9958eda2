// Softmax statistics on the CPU. One pass over memory: a row is taken in blocks that stay in the
// first-level cache; each block is read for its maximum, then for its sums relative to that
// maximum, and the block's sums are merged into the row's in double precision. The order is fixed
// by the block size alone, so a row's result depends on nothing but the row.
#include "common/vec.h"
#include "row_statistics/row_statistics.h"
#include "row_statistics/row_statistics_sums.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

// for argmax
struct Largest {
  float best = -kInfinity;
  int64_t argmax = 0;
  bool has_nan = false;
};

// the first of the largest logits, or the first NaN
template <typename T>
void update_argmax(const T* x, int count, float sign, float largest, bool nan, int64_t offset,
                   Largest* row) {
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
void next_block(const RowForward& a, const T* x, const float* weight, int count, int64_t offset,
                RowSums* row, Largest* largest) {
  const Scores<kCap> scores(a.scale, a.softcap);
  const float sign = sign_of(a.scale), top = largest_logit(x, count, sign);
  const Block block =
      add_block<T, kCap, kMoments, kWeighted>(scores, x, weight, count, top, row, WholeRow{});
  if (a.argmax) update_argmax(x, count, sign, top, block.sum != block.sum, offset, largest);
}

template <typename T, bool kCap, bool kMoments, bool kWeighted>
void forward_row(const RowForward& a, int64_t index) {
  if (a.target && a.target[index] == a.ignore_index) return skip_row(a, index);
  const T* x = static_cast<const T*>(a.logits) + index * a.row_stride;
  const float* weight = a.weight ? a.weight + index * a.weight_stride : nullptr;
  float gathered[kBlock];
  RowSums row;
  Largest largest;
  for (int64_t at = 0; at < a.classes; at += kBlock) {
    int count = int(a.classes - at < kBlock ? a.classes - at : kBlock);
    const float* w = weight ? weight + at : nullptr;
    if (a.class_stride == 1) {
      next_block<T, kCap, kMoments, kWeighted>(a, x + at, w, count, at, &row, &largest);
    } else {
      for (int i = 0; i < count; ++i) gathered[i] = to_float(x[(at + i) * a.class_stride]);
      next_block<float, kCap, kMoments, kWeighted>(a, gathered, w, count, at, &row, &largest);
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
  set(a.argmax, index, largest.argmax);
  if (!a.target) return;
  const int64_t target = a.target[index];
  double logprob = __builtin_nan("");
  if (target >= 0 && target < a.classes) {
    const Scores<kCap> scores(a.scale, a.softcap);
    logprob = log_probability(scores, x[target * a.class_stride], row, log_sum);
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
    Vec w = kWeighted && weight ? load_end(weight + i, rest, 0.f) : one;
    store_end(out + i, G::at(gradient, load_end(x + i, rest, 0.f), w), rest);
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
