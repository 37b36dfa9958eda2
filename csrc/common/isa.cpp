#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlm {
namespace {

bool has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return isa == Isa::base || (isa == Isa::avx2 && avx2) || (isa == Isa::avx512 && avx512);
#else
  return isa == Isa::base;
#endif
}

Isa choose() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  if (forced == nullptr || *forced == 0) {
    return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::base;
  }
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (std::string(forced) != isa_name(isa)) continue;
    if (has(isa)) return isa;
    throw std::runtime_error(std::string("FASTLM_CPU_ISA=") + forced +
                             ": this processor does not have it");
  }
  throw std::runtime_error(std::string("FASTLM_CPU_ISA must be base, avx2 or avx512, got ") +
                           forced);
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base";
}

}  // namespace fastlm
