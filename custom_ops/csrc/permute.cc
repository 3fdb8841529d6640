// permute, unpermute and the fused backward of unpermute on CPU. Shapes: T tokens, K choices, N rows, D width; see
// custom_ops/permute.py.
#include <algorithm>
#include <cstring>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace moejax {
namespace {

constexpr int64_t kTaskBytes = 1 << 18;

// Calls f(i) for every i < count, as many to a task as move about kTaskBytes.
template <typename F>
void over(ffi::ThreadPool& pool, int64_t count, int64_t bytes_each, const F& f) {
  const int64_t step = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes_each));
  parallel_for(pool, (count + step - 1) / step, [&](int64_t task) {
    for (int64_t i = task * step; i < std::min(count, (task + 1) * step); ++i) f(i);
  });
}

void zero_empty_rows(ffi::ThreadPool& pool, const ffi::Buffer<ffi::S32>& choice, char* rows, int64_t row_bytes) {
  const int32_t* choice_N = choice.typed_data();
  over(pool, choice.element_count(), row_bytes, [&](int64_t n) {
    if (choice_N[n] < 0) std::memset(rows + n * row_bytes, 0, row_bytes);
  });
}

// Each token's row is read once and written to all its places. `copy(choice, from, to)` writes one row.
template <typename Copy>
void spread(ffi::ThreadPool& pool, const char* x, const ffi::Buffer<ffi::S32>& position, char* rows, int64_t row_bytes,
            const Copy& copy) {
  const int64_t T = position.dimensions()[0], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  over(pool, T, (K + 1) * row_bytes, [&](int64_t t) {
    for (int64_t m = t * K; m < (t + 1) * K; ++m) {
      if (position_TK[m] >= 0) copy(m, x + t * row_bytes, rows + position_TK[m] * row_bytes);
    }
  });
}

template <typename T>
void spread_weighted(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::Buffer<ffi::S32>& position,
                     const ffi::AnyBuffer& weights, ffi::AnyBuffer& rows) {
  const int64_t D = x.dimensions()[1];
  const T* weights_TK = weights.typed_data<T>();
  spread(pool, static_cast<const char*>(x.untyped_data()), position, static_cast<char*>(rows.untyped_data()),
         D * sizeof(T), [&](int64_t m, const char* from, char* to) {
           kernels().of<T>().scale(D, weights_TK[m], reinterpret_cast<const T*>(from), reinterpret_cast<T*>(to));
         });
}

// Whether every position lies in [-1, N): a plan of another shape must not make a write outside of the buffers.
bool fits(const ffi::Buffer<ffi::S32>& position, int64_t N) {
  const int32_t* begin = position.typed_data();
  return std::all_of(begin, begin + position.element_count(), [N](int32_t p) { return p >= -1 && p < N; });
}

ffi::Error permute(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> position,
                   ffi::Buffer<ffi::S32> choice, ffi::AnyBuffer weights, ffi::Result<ffi::AnyBuffer> rows) {
  MOEJAX_REQUIRE(x.dimensions().size() == 2 && position.dimensions().size() == 2, "x must be [T, D], position [T, K]");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], N = choice.element_count();
  const int64_t K = position.dimensions()[1];
  MOEJAX_REQUIRE(position.dimensions()[0] == T, "x and position must have as many tokens");
  MOEJAX_REQUIRE(has_shape(*rows, {N, D}) && rows->element_type() == x.element_type(), "rows must be [N, D], as x");
  MOEJAX_REQUIRE(fits(position, N), "the plan holds rows that do not exist");
  const bool weighted = weights.element_count() > 0;
  if (weighted) {
    MOEJAX_REQUIRE(has_shape(weights, {T, K}) && weights.element_type() == x.element_type(),
                   "weights must be [T, K], of the dtype of x");
  }
  const int64_t row_bytes = D * ffi::ByteWidth(x.element_type());
  char* to = static_cast<char*>(rows->untyped_data());
  zero_empty_rows(pool, choice, to, row_bytes);
  if (!weighted) {
    spread(pool, static_cast<const char*>(x.untyped_data()), position, to, row_bytes,
           [&](int64_t, const char* from, char* there) { std::memcpy(there, from, row_bytes); });
  } else if (x.element_type() == ffi::F32) {
    spread_weighted<float>(pool, x, position, weights, *rows);
  } else if (x.element_type() == ffi::F64) {
    spread_weighted<double>(pool, x, position, weights, *rows);
  } else {
    return ffi::Error::InvalidArgument("moejax: weighted rows must be f32 or f64");
  }
  return ffi::Error::Success();
}

template <typename T>
void gather_sum(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::Buffer<ffi::S32>& position,
                const ffi::AnyBuffer& weights, ffi::AnyBuffer& y) {
  const int64_t D = y.dimensions()[1], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  const T* weights_TK = weights.element_count() > 0 ? weights.typed_data<T>() : nullptr;
  over(pool, y.dimensions()[0], (K + 1) * D * sizeof(T), [&](int64_t t) {
    T* to = y.typed_data<T>() + t * D;
    bool empty = true;
    for (int64_t m = t * K; m < (t + 1) * K; ++m) {
      if (position_TK[m] < 0) continue;
      const T* from = rows.typed_data<T>() + position_TK[m] * D;
      const T weight = weights_TK ? weights_TK[m] : T(1);
      (empty ? kernels().of<T>().scale : kernels().of<T>().add_scaled)(D, weight, from, to);
      empty = false;
    }
    if (empty) std::fill_n(to, D, T(0));
  });
}

ffi::Error unpermute(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> position, ffi::AnyBuffer weights,
                     ffi::Result<ffi::AnyBuffer> y) {
  MOEJAX_REQUIRE(rows.dimensions().size() == 2 && position.dimensions().size() == 2,
                 "rows must be [N, D], position [T, K]");
  const int64_t T = position.dimensions()[0], D = rows.dimensions()[1];
  MOEJAX_REQUIRE(has_shape(*y, {T, D}) && y->element_type() == rows.element_type(), "y must be [T, D], as the rows");
  MOEJAX_REQUIRE(fits(position, rows.dimensions()[0]), "the plan holds rows that do not exist");
  if (weights.element_count() > 0) {
    MOEJAX_REQUIRE(has_shape(weights, {T, position.dimensions()[1]}) && weights.element_type() == rows.element_type(),
                   "weights must be [T, K], of the rows' dtype");
  }
  switch (rows.element_type()) {
    case ffi::F32: gather_sum<float>(pool, rows, position, weights, *y); break;
    case ffi::F64: gather_sum<double>(pool, rows, position, weights, *y); break;
    default: return ffi::Error::InvalidArgument("moejax: rows must be f32 or f64");
  }
  return ffi::Error::Success();
}

template <typename T>
void scatter_and_dot(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& dy,
                     const ffi::Buffer<ffi::S32>& position, const ffi::AnyBuffer& weights, ffi::AnyBuffer& drows,
                     ffi::AnyBuffer& dweights) {
  const int64_t D = dy.dimensions()[1], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  over(pool, dy.dimensions()[0], 3 * K * D * sizeof(T), [&](int64_t t) {
    const T* from = dy.typed_data<T>() + t * D;
    for (int64_t m = t * K; m < (t + 1) * K; ++m) {
      const int64_t n = position_TK[m];
      dweights.typed_data<T>()[m] =
          n < 0 ? T(0)
                : kernels().of<T>().scale_and_dot(D, weights.typed_data<T>()[m], from, rows.typed_data<T>() + n * D,
                                                  drows.typed_data<T>() + n * D);
    }
  });
}

ffi::Error unpermute_backward(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer dy,
                              ffi::Buffer<ffi::S32> position, ffi::Buffer<ffi::S32> choice, ffi::AnyBuffer weights,
                              ffi::Result<ffi::AnyBuffer> drows, ffi::Result<ffi::AnyBuffer> dweights) {
  MOEJAX_REQUIRE(dy.dimensions().size() == 2 && position.dimensions().size() == 2,
                 "dy must be [T, D], position [T, K]");
  const int64_t T = dy.dimensions()[0], D = dy.dimensions()[1], N = choice.element_count();
  const int64_t K = position.dimensions()[1];
  MOEJAX_REQUIRE(position.dimensions()[0] == T, "dy and position must have as many tokens");
  MOEJAX_REQUIRE(has_shape(rows, {N, D}) && has_shape(*drows, {N, D}), "rows must be [N, D]");
  MOEJAX_REQUIRE(has_shape(weights, {T, K}) && has_shape(*dweights, {T, K}), "weights must be [T, K]");
  for (auto dtype : {dy.element_type(), weights.element_type(), drows->element_type(), dweights->element_type()}) {
    MOEJAX_REQUIRE(dtype == rows.element_type(), "operands and results must have one dtype");
  }
  MOEJAX_REQUIRE(fits(position, N), "the plan holds rows that do not exist");
  zero_empty_rows(pool, choice, static_cast<char*>(drows->untyped_data()), D * ffi::ByteWidth(dy.element_type()));
  switch (rows.element_type()) {
    case ffi::F32: scatter_and_dot<float>(pool, rows, dy, position, weights, *drows, *dweights); break;
    case ffi::F64: scatter_and_dot<double>(pool, rows, dy, position, weights, *drows, *dweights); break;
    default: return ffi::Error::InvalidArgument("moejax: rows must be f32 or f64");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_permute, moejax::permute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x [T, D], any dtype without weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>());            // rows [N, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute, moejax::unpermute,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>());            // y [T, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute_backward, moejax::unpermute_backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::AnyBuffer>()              // dy [T, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K]
                                  .Ret<xla::ffi::AnyBuffer>()              // drows [N, D]
                                  .Ret<xla::ffi::AnyBuffer>());            // dweights [T, K]
