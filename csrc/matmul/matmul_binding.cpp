#include <algorithm>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "common/binding.h"
#include "matmul/matmul.h"

namespace fastlm {
namespace {

// multiply-adds of a part that is worth a thread
constexpr int64_t kLeastPart = 1 << 19;
// packing b costs about as much as so many rows of a
constexpr int64_t kPackingRows = 8;

Matrix matrix(const Tensor& t) { return {in(t), t.stride(0), t.stride(1), is_bfloat16(t)}; }

void matmul_cpu(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias,
                bool accumulate, const Tensor& c, bool round) {
  MatmulArgs args{};
  args.a = matrix(a);
  args.b = matrix(b);
  args.bias = floats(bias);
  args.c = floats_out(c);
  args.c_row = c.stride(0);
  args.rows = c.size(0);
  args.columns = c.size(1);
  args.depth = a.size(1);
  args.accumulate = accumulate;
  args.round = round;
  const int64_t useful = (args.rows + kPackingRows) * args.columns * args.depth / kLeastPart;
  const int64_t members =
      std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), useful));
  auto run = FASTLM_PICK_BF16(matmul);
  const int64_t size = FASTLM_PICK_BF16(matmul_workspace)();
  parallel_rows(members, 1, [&](int64_t begin, int64_t end) {
    Workspace workspace = allocate(size);
    for (int64_t rank = begin; rank < end; ++rank)
      run(args, int(rank), int(members), workspace.get());
  });
}

// AMD processors from Zen 5 on (family 1Ah) add and multiply 512 bits at a time; MKL uses 256 of
// them on a processor that is not Intel's
bool mkl_is_slow() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(0, &eax, &ebx, &ecx, &edx)) return false;
  const bool amd = ebx == signature_AMD_ebx && ecx == signature_AMD_ecx && edx == signature_AMD_edx;
  if (!amd || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned family = ((eax >> 8) & 0xf) + ((eax >> 20) & 0xff);
  return family >= 0x1a && current_isa() >= Isa::avx512;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def(
      "matmul(Tensor a, Tensor b, Tensor? bias, bool accumulate, Tensor(a!) c, bool round=False) "
      "-> ()");
  m.def("mkl_is_slow() -> bool");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CPU, m) { m.impl("matmul", TORCH_BOX(&fastlm::matmul_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CompositeExplicitAutograd, m) {
  m.impl("mkl_is_slow", TORCH_BOX(&fastlm::mkl_is_slow));
}
