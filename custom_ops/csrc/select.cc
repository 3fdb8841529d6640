// Which of the compiled instruction sets is used.
#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace moejax {

namespace baseline { extern const Kernels kKernels; }
#ifdef MOEJAX_X86
namespace avx2 { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
#endif

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef MOEJAX_X86
    // A name in MOEJAX_INSTRUCTION_SET forbids what is beyond it, so that one machine can test all of them.
    const char* const named = std::getenv("MOEJAX_INSTRUCTION_SET");
    const std::string_view most = named ? named : avx512::kKernels.instruction_set;
    __builtin_cpu_init();
    if (most == avx512::kKernels.instruction_set && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::kKernels;
    if (most != baseline::kKernels.instruction_set && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      return avx2::kKernels;
#endif
    return baseline::kKernels;
  }();
  return chosen;
}

}  // namespace moejax

extern "C" const char* moejax_instruction_set() { return moejax::kernels().instruction_set; }
