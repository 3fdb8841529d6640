// Which of the compiled instruction sets this machine runs.
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
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return avx512::kKernels;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kKernels;
#endif
    return baseline::kKernels;
  }();
  return chosen;
}

}  // namespace moejax

extern "C" const char* moejax_instruction_set() { return moejax::kernels().instruction_set; }
