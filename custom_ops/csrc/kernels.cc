// The inner loops for one instruction set; this file is compiled once for each. MOEJAX_ISA is its namespace,
// MOEJAX_ISA_NAME what people call it, MOEJAX_VECTOR_BYTES the width of its vectors.
#include "kernels.h"

#include "activations.h"
#include "products.h"
#include "rows.h"

namespace moejax::MOEJAX_ISA {
namespace {

template <typename T>
RowKernels<T> of_rows() {
  return {product<T>, narrow<T>, scale<T>, sum<T>, scale_and_dot<T>};
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {MOEJAX_ISA_NAME,
                          {copy, copy_past_caches, fence},
                          of_rows<float>(),
                          of_rows<double>(),
                          of_rows<bf16>(),
                          of_rows<f16>(),
                          {swiglu, swiglu_backward},
                          {swiglu, swiglu_backward}};

}  // namespace moejax::MOEJAX_ISA
