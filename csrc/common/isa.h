// One source, several instruction sets: every *_cpu.cpp is compiled once for each with
// -DFASTLM_ISA=base|avx2|avx512, and the processor decides at run time which copy is called.
//
// Where the compiler knows AVX512_BF16 (FASTLM_AVX512_BF16), the sources that have a use for its
// products of bfloat16 pairs are compiled once more, as avx512_bf16; for all others that level is
// avx512.
#pragma once

#if defined(__x86_64__)
// declares `return_type name parameters` in the namespaces base, avx2 and avx512
#define FASTLM_PER_ISA(return_type, name, parameters) \
  namespace base {                                    \
  return_type name parameters;                        \
  }                                                   \
  namespace avx2 {                                    \
  return_type name parameters;                        \
  }                                                   \
  namespace avx512 {                                  \
  return_type name parameters;                        \
  }
// the copy of `name` that this processor should run, as a function pointer
#define FASTLM_PICK(name)                                           \
  (::fastlm::current_isa() >= ::fastlm::Isa::avx512 ? &avx512::name \
   : ::fastlm::current_isa() == ::fastlm::Isa::avx2 ? &avx2::name   \
                                                    : &base::name)
#else
#define FASTLM_PER_ISA(return_type, name, parameters) \
  namespace base {                                    \
  return_type name parameters;                        \
  }
#define FASTLM_PICK(name) (&base::name)
#endif

// the same for a source that has a copy for avx512_bf16 too
#if defined(FASTLM_AVX512_BF16)
#define FASTLM_PER_ISA_BF16(return_type, name, parameters) \
  FASTLM_PER_ISA(return_type, name, parameters)            \
  namespace avx512_bf16 {                                  \
  return_type name parameters;                             \
  }
#define FASTLM_PICK_BF16(name) \
  (::fastlm::current_isa() == ::fastlm::Isa::avx512_bf16 ? &avx512_bf16::name : FASTLM_PICK(name))
#else
#define FASTLM_PER_ISA_BF16 FASTLM_PER_ISA
#define FASTLM_PICK_BF16 FASTLM_PICK
#endif

namespace fastlm {
enum class Isa { base, avx2, avx512, avx512_bf16 };
// the best set this processor has, or the one FASTLM_CPU_ISA names; throws if it is not there
Isa current_isa();
const char* isa_name(Isa isa);
}  // namespace fastlm
