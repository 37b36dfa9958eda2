// Divergence on the CPU. Two rows of logits fit in the second-level cache, so that memory sees one
// read and one write: a pass for the two maxima, one for the sums relative to them, one that writes
// the gradient. Sums are taken in blocks, which are added in double precision; their order depends
// on nothing but the length of the row.
#include "common/vec.h"
#include "divergence/divergence.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 4096;

#define FASTLM_LAMBDA __attribute__((always_inline))

// log-probabilities of a row: scale * (logits - max) - log_sum
struct Scores {
  float* logits;
  float scale, max;
  double log_sum = 0;

  Scores(float* logits, float scale, int64_t classes)
      : logits(logits), scale(scale), max(largest_of(logits, classes, 1.f)) {}
};

// scores relative to the largest, which must be exactly 0 (the product first, contracted with the
// difference, would leave its rounding); lanes outside read as -infinity, without probability
FASTLM_INLINE Vec shifted(const Scores& row, int64_t i, int count) {
  Vec x = count == kLanes ? load(row.logits + i) : load_first(row.logits + i, count, -kInfinity);
  return (x - row.max) * row.scale;
}

FASTLM_INLINE void write(float* p, Vec x, int count) {
  if (count == kLanes) return store(p, x);
  store_first(p, x, count);
}

// 0 log 0 = 0, and infinite scores must not turn it into NaN
FASTLM_INLINE Vec where_possible(Vec probability, Vec x) {
  return select(probability == 0.f, Vec{}, x);
}

// body(i, lanes) for every vector of a row
template <typename Body>
FASTLM_INLINE void for_vectors(int64_t classes, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) body(i, kLanes);
  if (i < classes) body(i, int(classes - i));
}

// total += what terms(i, lanes, sums) adds to the sums over a row
template <int kSums, typename Terms>
FASTLM_INLINE void add_up(int64_t classes, double (&total)[kSums], const Terms& terms) {
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = classes - begin < kBlock ? classes : begin + kBlock;
    Vec even[kSums]{}, odd[kSums]{};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      terms(i, kLanes, even);
      terms(i + kLanes, kLanes, odd);
    }
    for (; i < end; i += kLanes) terms(i, end - i < kLanes ? int(end - i) : kLanes, even);
    for (int s = 0; s < kSums; ++s) total[s] += reduce_add(even[s] + odd[s]);
  }
}

// KL(a || b), and the log-sums of both
double kl(Scores* a, Scores* b, int64_t classes) {
  double total[3] = {};  // exp(a), exp(b), exp(a) (a - b)
  const Scores first = *a, second = *b;
  add_up(classes, total, [&](int64_t i, int count, Vec* sums) FASTLM_LAMBDA {
    Vec x = shifted(first, i, count), y = shifted(second, i, count);
    Vec e = exp(x);
    sums[0] += e;
    sums[1] += exp(y);
    sums[2] += where_possible(e, e * (x - y));
  });
  a->log_sum = __builtin_log(total[0]);
  b->log_sum = __builtin_log(total[1]);
  return total[2] / total[0] - a->log_sum + b->log_sum;
}

double forward_kl(Scores student, Scores teacher, int64_t classes, const float* factor) {
  const double value = kl(&teacher, &student, classes);
  if (!factor) return value;
  const float on_q = float(student.log_sum), on_p = float(teacher.log_sum);
  const float by = *factor * student.scale;
  for_vectors(classes, [&](int64_t i, int count) FASTLM_LAMBDA {
    Vec q = exp(shifted(student, i, count) - on_q), p = exp(shifted(teacher, i, count) - on_p);
    write(student.logits + i, (q - p) * by, count);
  });
  return value;
}

double reverse_kl(Scores student, Scores teacher, int64_t classes, const float* factor) {
  const double value = kl(&student, &teacher, classes);
  if (!factor) return value;
  const float log_sum = float(student.log_sum), by = *factor * student.scale;
  // q (log q - log p - value)
  const float origin = float(student.log_sum - teacher.log_sum + value);
  for_vectors(classes, [&](int64_t i, int count) FASTLM_LAMBDA {
    Vec z = shifted(student, i, count), t = shifted(teacher, i, count);
    Vec q = exp(z - log_sum);
    write(student.logits + i, q * (where_possible(q, z - t) - origin) * by, count);
  });
  return value;
}

void log_sums(Scores* a, Scores* b, int64_t classes) {
  double total[2] = {};
  const Scores first = *a, second = *b;
  add_up(classes, total, [&](int64_t i, int count, Vec* sums) FASTLM_LAMBDA {
    sums[0] += exp(shifted(first, i, count));
    sums[1] += exp(shifted(second, i, count));
  });
  a->log_sum = __builtin_log(total[0]);
  b->log_sum = __builtin_log(total[1]);
}

double jsd(Scores student, Scores teacher, int64_t classes, double weight, const float* factor) {
  log_sums(&student, &teacher, classes);
  const float on_q = float(student.log_sum), on_p = float(teacher.log_sum);
  const float beta = float(weight), rest = float(1 - weight);
  double total[2] = {};  // KL(p || m), KL(q || m)
  add_up(classes, total, [&](int64_t i, int count, Vec* sums) FASTLM_LAMBDA {
    Vec q = exp(shifted(student, i, count) - on_q), p = exp(shifted(teacher, i, count) - on_p);
    // log(p / m) = -log(1 + (m - p) / p): exact in the limit of p = q, where log(p / m) would
    // give the rounding of p / m; the quotient is less than 1 / the least normal number
    Vec difference = q - p;
    sums[0] -= where_possible(p, p * log1p(rest * difference / p));
    Vec u = -where_possible(q, q * log1p(-beta * difference / q));
    sums[1] += u;
    if (!factor) return;
    write(student.logits + i, q, count);
    write(teacher.logits + i, u, count);
  });
  const double value = weight * total[0] + (1 - weight) * total[1];
  if (!factor) return value;
  // (1 - beta) q (log q - log m - KL(q || m))
  const float by = rest * *factor * student.scale, origin = float(total[1]);
  for_vectors(classes, [&](int64_t i, int count) FASTLM_LAMBDA {
    if (count == kLanes) {
      Vec q = load(student.logits + i);
      store(student.logits + i, (load(teacher.logits + i) - q * origin) * by);
      return;
    }
    Vec q = load_first(student.logits + i, count, 0.f),
        u = load_first(teacher.logits + i, count, 0);
    store_first(student.logits + i, (u - q * origin) * by, count);
  });
  return value;
}

}  // namespace

void divergence_rows(const DivergenceArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const Scores student(a.logits + row * a.classes, a.scale, a.classes);
    const Scores teacher(a.teacher + row * a.classes, a.scale, a.classes);
    const float* factor = a.factor ? a.factor + row : nullptr;
    double value;
    if (a.kind == Divergence::forward) {
      value = forward_kl(student, teacher, a.classes, factor);
    } else if (a.kind == Divergence::reverse) {
      value = reverse_kl(student, teacher, a.classes, factor);
    } else {
      value = jsd(student, teacher, a.classes, a.beta, factor);
    }
    a.value[row] = float(value);
  }
}

}  // namespace FASTLM_ISA
}  // namespace fastlm
