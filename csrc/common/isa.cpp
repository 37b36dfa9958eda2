#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastlm {
namespace {

constexpr Isa kAll[] = {Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::base};

#if defined(FASTLM_AVX512_BF16)
constexpr bool kKnowsBf16 = true;
#else
constexpr bool kKnowsBf16 = false;
#endif

bool has(Isa isa) {
  if (isa == Isa::base) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa >= Isa::avx512)
    found = found && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(FASTLM_AVX512_BF16)
  if (isa == Isa::avx512_bf16) found = found && __builtin_cpu_supports("avx512bf16");
#endif
  return found && (isa != Isa::avx512_bf16 || kKnowsBf16);
#else
  return false;
#endif
}

Isa choose() {
  const char* forced = std::getenv("FASTLM_CPU_ISA");
  const bool free = forced == nullptr || *forced == 0;
  for (Isa isa : kAll) {
    if (!free && std::string(forced) != isa_name(isa)) continue;
    if (has(isa)) return isa;
    if (free) continue;
    const char* lacks = isa == Isa::avx512_bf16 && !kKnowsBf16 ? "build" : "processor";
    throw std::runtime_error(std::string("FASTLM_CPU_ISA=") + forced + ": this " + lacks +
                             " does not have it");
  }
  throw std::runtime_error(
      std::string("FASTLM_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got ") + forced);
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512_bf16 ? "avx512_bf16"
         : isa == Isa::avx512    ? "avx512"
         : isa == Isa::avx2      ? "avx2"
                                 : "base";
}

}  // namespace fastlm
