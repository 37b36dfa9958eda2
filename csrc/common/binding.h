// The one header that knows torch: stable-ABI tensors in, plain pointers out.
//
// A binding checks nothing but dtypes it cannot read; shapes and values were checked in Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>

#include "common/isa.h"
#include "common/threads.h"

namespace fastlm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// raw pointers: the dtype was chosen by the caller through the kernel it calls
inline const void* in(const Tensor& t) { return t.const_data_ptr(); }
inline const void* in(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }
// a schema marks outputs as Tensor(a!); the stable ABI hands them over as const Tensor&
inline void* out(const Tensor& t) { return const_cast<Tensor&>(t).mutable_data_ptr(); }
inline void* out(const std::optional<Tensor>& t) { return t ? out(*t) : nullptr; }

inline const float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "fastlm_C: a float32 tensor was expected");
  return static_cast<const float*>(in(t));
}
inline const float* floats(const std::optional<Tensor>& t) { return t ? floats(*t) : nullptr; }
inline float* floats_out(const Tensor& t) { return const_cast<float*>(floats(t)); }

inline bool is_bfloat16(const Tensor& t) {
  ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                  "fastlm_C: float32 or bfloat16 only");
  return type == ScalarType::BFloat16;
}

struct FreeAligned {
  void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Workspace = std::unique_ptr<float, FreeAligned>;

inline Workspace allocate(int64_t count) {
  return Workspace(
      static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64))));
}

// body(begin, end) over chunks of [0, count), on torch's threads
template <typename Body>
void parallel_rows(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, body);
}

// body(team, rank) once per member of a team of at most `threads`
template <typename Body>
void parallel_team(int threads, const Body& body) {
  Team team;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    int rank = team.join(int(begin), threads);
    if (rank >= 0) body(team, rank);
  });
}

}  // namespace fastlm
