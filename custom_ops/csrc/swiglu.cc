// SwiGLU over rows on CPU, forward and the weighted backward pass. Shapes: N rows, F hidden width; see
// custom_ops/swiglu.py.
#include <algorithm>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace moejax {
namespace {

constexpr int64_t kTaskElements = 1 << 15;

// Calls f(row) for every row, some rows per task.
template <typename F>
void over_rows(ffi::ThreadPool& pool, int64_t rows, int64_t width, const F& f) {
  const int64_t step = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  parallel_for(pool, (rows + step - 1) / step, [&](int64_t task) {
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) f(row);
  });
}

template <ffi::DataType dtype>
ffi::Error forward(ffi::ThreadPool& pool, const ffi::AnyBuffer& hidden, ffi::AnyBuffer& activated) {
  using T = ffi::NativeType<dtype>;
  const int64_t N = activated.dimensions()[0], F = activated.dimensions()[1];
  over_rows(pool, N, F, [&](int64_t n) {
    kernels().swiglu<T>().forward(F, hidden.typed_data<T>() + n * 2 * F, activated.typed_data<T>() + n * F);
  });
  return ffi::Error::Success();
}

template <ffi::DataType dtype>
ffi::Error backward(ffi::ThreadPool& pool, const ffi::AnyBuffer& hidden, const ffi::AnyBuffer& d_activated,
                    const ffi::AnyBuffer& weights, ffi::AnyBuffer& weighted, ffi::AnyBuffer& d_hidden,
                    ffi::AnyBuffer& d_weights) {
  using T = ffi::NativeType<dtype>;
  const int64_t N = weighted.dimensions()[0], F = weighted.dimensions()[1];
  over_rows(pool, N, F, [&](int64_t n) {
    kernels().swiglu<T>().backward({F, hidden.typed_data<T>() + n * 2 * F, d_activated.typed_data<T>() + n * F,
                                     weights.typed_data<T>()[n], weighted.typed_data<T>() + n * F,
                                     d_hidden.typed_data<T>() + n * 2 * F, d_weights.typed_data<T>() + n});
  });
  return ffi::Error::Success();
}

ffi::Error swiglu(ffi::ThreadPool pool, ffi::AnyBuffer hidden, ffi::Result<ffi::AnyBuffer> activated) {
  MOEJAX_REQUIRE(activated->dimensions().size() == 2, "the result must be [N, F]");
  const int64_t N = activated->dimensions()[0], F = activated->dimensions()[1];
  MOEJAX_REQUIRE(has_shape(hidden, {N, 2 * F}), "hidden must be [N, 2F]");
  MOEJAX_REQUIRE(activated->element_type() == hidden.element_type(), "hidden and result must have one dtype");
  switch (hidden.element_type()) {
    case ffi::F32: return forward<ffi::F32>(pool, hidden, *activated);
    case ffi::F64: return forward<ffi::F64>(pool, hidden, *activated);
    default: return ffi::Error::InvalidArgument("moejax: SwiGLU must be f32 or f64");
  }
}

ffi::Error swiglu_backward(ffi::ThreadPool pool, ffi::AnyBuffer hidden, ffi::AnyBuffer d_activated,
                           ffi::AnyBuffer weights, ffi::Result<ffi::AnyBuffer> weighted,
                           ffi::Result<ffi::AnyBuffer> d_hidden, ffi::Result<ffi::AnyBuffer> d_weights) {
  MOEJAX_REQUIRE(d_activated.dimensions().size() == 2, "d_activated must be [N, F]");
  const int64_t N = d_activated.dimensions()[0], F = d_activated.dimensions()[1];
  MOEJAX_REQUIRE(has_shape(hidden, {N, 2 * F}) && has_shape(*d_hidden, {N, 2 * F}), "hidden must be [N, 2F]");
  MOEJAX_REQUIRE(has_shape(weights, {N}) && has_shape(*d_weights, {N}), "weights must be [N]");
  MOEJAX_REQUIRE(has_shape(*weighted, {N, F}), "the weighted activation must be [N, F]");
  for (auto dtype : {d_activated.element_type(), weights.element_type(), weighted->element_type(),
                     d_hidden->element_type(), d_weights->element_type()}) {
    MOEJAX_REQUIRE(dtype == hidden.element_type(), "operands and results must have one dtype");
  }
  switch (hidden.element_type()) {
    case ffi::F32: return backward<ffi::F32>(pool, hidden, d_activated, weights, *weighted, *d_hidden, *d_weights);
    case ffi::F64: return backward<ffi::F64>(pool, hidden, d_activated, weights, *weighted, *d_hidden, *d_weights);
    default: return ffi::Error::InvalidArgument("moejax: SwiGLU must be f32 or f64");
  }
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_swiglu, moejax::Guarded<moejax::swiglu>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()    // hidden [N, 2F]
                                  .Ret<xla::ffi::AnyBuffer>());  // activated [N, F]

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_swiglu_backward, moejax::Guarded<moejax::swiglu_backward>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()    // hidden [N, 2F]
                                  .Arg<xla::ffi::AnyBuffer>()    // d activated, before weighting [N, F]
                                  .Arg<xla::ffi::AnyBuffer>()    // weights [N]
                                  .Ret<xla::ffi::AnyBuffer>()    // weight * activated [N, F]
                                  .Ret<xla::ffi::AnyBuffer>()    // d hidden [N, 2F]
                                  .Ret<xla::ffi::AnyBuffer>());  // d weights [N]
