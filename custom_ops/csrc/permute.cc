// permute, unpermute and the fused backward of unpermute on CPU. Shapes: T tokens, K choices, N rows, D width; see
// custom_ops/permute.py.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace moejax {
namespace {

// What a task moves: enough to pay for waking a thread, little enough to share out small buffers too.
constexpr int64_t kTaskBytes = 1 << 18;
// Results of more bytes than this have left the caches before they are read.
constexpr int64_t kCachedBytes = 1 << 24;

int64_t per_task(int64_t bytes_each) { return std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, bytes_each)); }

// Calls f(begin, end) for ranges that cover [0, count), each of which moves about kTaskBytes.
template <typename F>
void over(ffi::ThreadPool& pool, int64_t count, int64_t bytes_each, const F& f) {
  const int64_t step = per_task(bytes_each);
  parallel_for(pool, (count + step - 1) / step,
               [&](int64_t task) { f(task * step, std::min(count, (task + 1) * step)); });
}

// Both written without a way out of the loop, so that the compiler makes vectors of them.
bool all_within(const ffi::Buffer<ffi::S32>& positions, int64_t N) {
  int32_t lowest = 0, highest = -1;
  for (const int32_t *p = positions.typed_data(), *end = p + positions.element_count(); p != end; ++p) {
    lowest = std::min(lowest, *p);
    highest = std::max(highest, *p);
  }
  return lowest >= -1 && highest < N;
}
bool any_empty(const ffi::Buffer<ffi::S32>& choice) {
  int32_t lowest = 0;
  for (const int32_t *c = choice.typed_data(), *end = c + choice.element_count(); c != end; ++c) {
    lowest = std::min(lowest, *c);
  }
  return lowest < 0;
}

// What the checks of all handlers here have in common: a plan of another shape must not make a write outside of the
// buffers.
ffi::Error check_plan(const ffi::Buffer<ffi::S32>& position, int64_t T, int64_t N) {
  MOEJAX_REQUIRE(position.dimensions().size() == 2, "position must be [T, K]");
  MOEJAX_REQUIRE(position.dimensions()[0] == T, "there must be a position for every token");
  MOEJAX_REQUIRE(N < kMaxRows, "there must be less than 2**31 rows");
  MOEJAX_REQUIRE(all_within(position, N), "the plan holds rows that do not exist");
  return ffi::Error::Success();
}

void zero_empty_rows(ffi::ThreadPool& pool, const ffi::Buffer<ffi::S32>& choice, void* rows, int64_t row_bytes) {
  if (!any_empty(choice)) return;
  const int32_t* choice_N = choice.typed_data();
  over(pool, choice.element_count(), row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (choice_N[n] < 0) std::memset(static_cast<char*>(rows) + n * row_bytes, 0, row_bytes);
    }
  });
}

// Each token's row is read once and written to all its places. `copy(choice, from, to)` writes one row.
template <typename Copy>
void spread(ffi::ThreadPool& pool, const void* x, const ffi::Buffer<ffi::S32>& position, void* rows, int64_t row_bytes,
            const Copy& copy) {
  const int64_t T = position.dimensions()[0], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  over(pool, T, (K + 1) * row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * K; m < end * K; ++m) {
      if (position_TK[m] < 0) continue;
      copy(m, static_cast<const char*>(x) + m / K * row_bytes, static_cast<char*>(rows) + position_TK[m] * row_bytes);
    }
    kernels().bytes.fence();
  });
}

template <typename T>
void spread_weighted(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::Buffer<ffi::S32>& position,
                     const ffi::AnyBuffer& weights, ffi::AnyBuffer& rows) {
  const int64_t D = x.dimensions()[1];
  const auto* weights_TK = static_cast<const Wide<T>*>(weights.untyped_data());
  const auto scale = kernels().of<T>().scale;
  spread(pool, x.untyped_data(), position, rows.untyped_data(), D * sizeof(T), [&](int64_t m, const char* from, char* to) {
    scale(D, weights_TK[m], reinterpret_cast<const T*>(from), reinterpret_cast<T*>(to));
  });
}

// Calls f with a null pointer to the type of the rows; the weights belong to it when they have its wide type.
template <typename F>
ffi::Error by_dtype(ffi::DataType dtype, ffi::DataType weights_dtype, const F& f) {
  MOEJAX_REQUIRE(weights_dtype == (dtype == ffi::F64 ? ffi::F64 : ffi::F32), "weights must be f32, or f64 beside f64");
  switch (dtype) {
    case ffi::BF16: f(static_cast<bf16*>(nullptr)); break;
    case ffi::F16: f(static_cast<f16*>(nullptr)); break;
    case ffi::F32: f(static_cast<float*>(nullptr)); break;
    case ffi::F64: f(static_cast<double*>(nullptr)); break;
    default: return ffi::Error::InvalidArgument("moejax: rows must be bf16, f16, f32 or f64");
  }
  return ffi::Error::Success();
}

ffi::Error permute(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> position,
                   ffi::Buffer<ffi::S32> choice, ffi::AnyBuffer weights, ffi::Result<ffi::AnyBuffer> rows) {
  MOEJAX_REQUIRE(x.dimensions().size() == 2, "x must be [T, D]");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], N = choice.element_count();
  MOEJAX_REQUIRE(has_shape(*rows, {N, D}) && rows->element_type() == x.element_type(), "rows must be [N, D], as x");
  if (const ffi::Error error = check_plan(position, T, N); error.failure()) return error;
  const bool weighted = weights.element_count() > 0;
  MOEJAX_REQUIRE(!weighted || has_shape(weights, {T, position.dimensions()[1]}), "weights must be [T, K]");
  MOEJAX_REQUIRE(is_whole_bytes(x.element_type()), "x must be of a dtype of at least 8 bits");
  const int64_t row_bytes = D * ffi::ByteWidth(x.element_type());
  zero_empty_rows(pool, choice, rows->untyped_data(), row_bytes);
  if (weighted) {
    return by_dtype(x.element_type(), weights.element_type(), [&](auto* type) {
      spread_weighted<std::remove_pointer_t<decltype(type)>>(pool, x, position, weights, *rows);
    });
  }
  const CopyKernels& bytes = kernels().bytes;
  const auto copy = N * row_bytes > kCachedBytes ? bytes.copy_past_caches : bytes.copy;
  spread(pool, x.untyped_data(), position, rows->untyped_data(), row_bytes,
         [&](int64_t, const char* from, char* to) { copy(row_bytes, from, to); });
  return ffi::Error::Success();
}

template <typename T>
void gather_sum(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::Buffer<ffi::S32>& position,
                const ffi::AnyBuffer& weights, ffi::AnyBuffer& y) {
  const int64_t D = y.dimensions()[1], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  const T* rows_ND = static_cast<const T*>(rows.untyped_data());
  const auto* weights_TK = weights.element_count() > 0 ? static_cast<const Wide<T>*>(weights.untyped_data()) : nullptr;
  T* y_TD = static_cast<T*>(y.untyped_data());
  const auto sum = kernels().of<T>().sum;
  over(pool, y.dimensions()[0], (K + 1) * D * sizeof(T), [&](int64_t begin, int64_t end) {
    std::vector<const T*> there(K);
    std::vector<Wide<T>> theirs(K);
    for (int64_t t = begin; t < end; ++t) {
      int64_t count = 0;
      for (int64_t m = t * K; m < (t + 1) * K; ++m) {
        if (position_TK[m] < 0) continue;
        there[count] = rows_ND + position_TK[m] * D;
        theirs[count++] = weights_TK ? weights_TK[m] : Wide<T>(1);
      }
      sum(D, count, there.data(), theirs.data(), y_TD + t * D);
    }
  });
}

ffi::Error unpermute(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> position, ffi::AnyBuffer weights,
                     ffi::Result<ffi::AnyBuffer> y) {
  MOEJAX_REQUIRE(rows.dimensions().size() == 2 && y->dimensions().size() == 2, "rows must be [N, D], y [T, D]");
  const int64_t T = y->dimensions()[0], D = rows.dimensions()[1];
  MOEJAX_REQUIRE(has_shape(*y, {T, D}) && y->element_type() == rows.element_type(), "y must be [T, D], as the rows");
  if (const ffi::Error error = check_plan(position, T, rows.dimensions()[0]); error.failure()) return error;
  MOEJAX_REQUIRE(weights.element_count() == 0 || has_shape(weights, {T, position.dimensions()[1]}),
                 "weights must be [T, K]");
  return by_dtype(rows.element_type(), weights.element_type(), [&](auto* type) {
    gather_sum<std::remove_pointer_t<decltype(type)>>(pool, rows, position, weights, *y);
  });
}

template <typename T>
void scatter_and_dot(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& dy,
                     const ffi::Buffer<ffi::S32>& position, const ffi::AnyBuffer& weights, ffi::AnyBuffer& drows,
                     ffi::AnyBuffer& dweights) {
  const int64_t D = dy.dimensions()[1], K = position.dimensions()[1];
  const int32_t* position_TK = position.typed_data();
  const T* rows_ND = static_cast<const T*>(rows.untyped_data());
  const T* dy_TD = static_cast<const T*>(dy.untyped_data());
  const auto* weights_TK = static_cast<const Wide<T>*>(weights.untyped_data());
  T* drows_ND = static_cast<T*>(drows.untyped_data());
  auto* dweights_TK = static_cast<Wide<T>*>(dweights.untyped_data());
  const auto scale_and_dot = kernels().of<T>().scale_and_dot;
  over(pool, dy.dimensions()[0], 3 * K * D * sizeof(T), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin * K; m < end * K; ++m) {
      const int64_t n = position_TK[m];
      dweights_TK[m] =
          n < 0 ? 0 : scale_and_dot(D, weights_TK[m], dy_TD + m / K * D, rows_ND + n * D, drows_ND + n * D);
    }
  });
}

ffi::Error unpermute_backward(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer dy,
                              ffi::Buffer<ffi::S32> position, ffi::Buffer<ffi::S32> choice, ffi::AnyBuffer weights,
                              ffi::Result<ffi::AnyBuffer> drows, ffi::Result<ffi::AnyBuffer> dweights) {
  MOEJAX_REQUIRE(dy.dimensions().size() == 2, "dy must be [T, D]");
  const int64_t T = dy.dimensions()[0], D = dy.dimensions()[1], N = choice.element_count();
  MOEJAX_REQUIRE(has_shape(rows, {N, D}) && has_shape(*drows, {N, D}), "rows must be [N, D]");
  if (const ffi::Error error = check_plan(position, T, N); error.failure()) return error;
  const int64_t K = position.dimensions()[1];
  MOEJAX_REQUIRE(has_shape(weights, {T, K}) && has_shape(*dweights, {T, K}), "weights must be [T, K]");
  MOEJAX_REQUIRE(dy.element_type() == rows.element_type() && drows->element_type() == rows.element_type(),
                 "rows, dy and drows must have one dtype");
  MOEJAX_REQUIRE(dweights->element_type() == weights.element_type(), "weights and their gradient must have one dtype");
  zero_empty_rows(pool, choice, drows->untyped_data(), D * ffi::ByteWidth(dy.element_type()));
  return by_dtype(rows.element_type(), weights.element_type(), [&](auto* type) {
    scatter_and_dot<std::remove_pointer_t<decltype(type)>>(pool, rows, dy, position, weights, *drows, *dweights);
  });
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_permute, moejax::Guarded<moejax::permute>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x [T, D], any dtype without weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>());            // rows [N, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute, moejax::Guarded<moejax::unpermute>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>());            // y [T, D]

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute_backward, moejax::Guarded<moejax::unpermute_backward>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::AnyBuffer>()              // dy [T, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K]
                                  .Ret<xla::ffi::AnyBuffer>()              // drows [N, D]
                                  .Ret<xla::ffi::AnyBuffer>());            // dweights [T, K]
