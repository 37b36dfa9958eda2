#include <string>

#include "common/binding.h"

namespace fastlm {
namespace {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string build_info() {
#if defined(FASTLM_CUDA)
  const char* cuda = "with CUDA kernels";
#else
  const char* cuda = "CPU only";
#endif
#if defined(__clang__)
  const char* compiler = __VERSION__;
#else
  const char* compiler = "GCC " __VERSION__;
#endif
  return std::string(compiler) + ", " + cuda + ", torch stable ABI 2.10";
}

}  // namespace
}  // namespace fastlm

STABLE_TORCH_LIBRARY_FRAGMENT(fastlm_C, m) {
  m.def("cpu_isa() -> str");
  m.def("build_info() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(fastlm_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastlm::cpu_isa));
  m.impl("build_info", TORCH_BOX(&fastlm::build_info));
}
