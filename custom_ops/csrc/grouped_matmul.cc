// Grouped matrix products on CPU. Shapes: N rows, E groups, D and F widths; see custom_ops/grouped_matmul.py.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace moejax {
namespace {

// Rows and columns of C that one task computes, at most: enough to pay for packing its part of B, few enough to share
// out. Rows are cut evenly, in multiples of a tile's.
constexpr int64_t kTaskRows = 480;
constexpr int64_t kTileRows = 12;
constexpr int64_t kTaskCols = 256;

// Group e owns the rows bounds[e] .. bounds[e + 1] - 1; what exceeds N is cut off.
std::vector<int64_t> group_bounds(const int32_t* sizes, int64_t num_groups, int64_t num_rows) {
  std::vector<int64_t> bounds(num_groups + 1, 0);
  for (int64_t e = 0; e < num_groups; ++e) {
    bounds[e + 1] = std::min(num_rows, bounds[e] + std::max<int64_t>(0, sizes[e]));
  }
  return bounds;
}

// Cuts a product into tasks, column blocks of the same rows next to each other.
template <typename T>
void add_tasks(std::vector<Product<T>>& tasks, const Product<T>& whole) {
  const int64_t parts = std::max<int64_t>(1, (whole.rows + kTaskRows - 1) / kTaskRows);
  const int64_t step = ((whole.rows + parts - 1) / parts + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t row = 0; row < whole.rows; row += step) {
    for (int64_t col = 0; col < whole.cols; col += kTaskCols) {
      Product<T> part = whole;
      part.rows = std::min(step, whole.rows - row);
      part.cols = std::min(kTaskCols, whole.cols - col);
      part.a += row * whole.a_row;
      part.b += col * whole.b_col;
      part.c += row * whole.c_row + col;
      tasks.push_back(part);
    }
  }
}

template <typename T>
void run(ffi::ThreadPool& pool, const std::vector<Product<T>>& tasks) {
  parallel_for(pool, tasks.size(), [&](int64_t i) { kernels().of<T>().product(tasks[i]); });
}

// out[N, B] = lhs[N, A] times its group's w[e], or w[e] transposed.
template <typename T>
void rowwise(ffi::ThreadPool& pool, const ffi::AnyBuffer& lhs, const ffi::AnyBuffer& w, const int32_t* sizes,
             bool transposed, ffi::AnyBuffer& out) {
  const int64_t N = lhs.dimensions()[0], A = lhs.dimensions()[1], B = out.dimensions()[1];
  const int64_t E = w.dimensions()[0];
  const std::vector<int64_t> bounds = group_bounds(sizes, E, N);
  const T* rows = lhs.typed_data<T>();
  T* to = out.typed_data<T>();
  std::vector<Product<T>> tasks;
  for (int64_t e = 0; e < E; ++e) {
    const T* matrix = w.typed_data<T>() + e * A * B;
    add_tasks<T>(tasks, {bounds[e + 1] - bounds[e], B, A, rows + bounds[e] * A, A, 1, matrix, transposed ? 1 : B,
                         transposed ? A : 1, to + bounds[e] * B, B});
  }
  run(pool, tasks);
  std::fill(to + bounds[E] * B, to + N * B, T(0));
}

// dw[e] = rows of group e, transposed, times dout of group e.
template <typename T>
void columnwise(ffi::ThreadPool& pool, const ffi::AnyBuffer& rows, const ffi::AnyBuffer& dout, const int32_t* sizes,
                ffi::AnyBuffer& dw) {
  const int64_t N = rows.dimensions()[0], D = rows.dimensions()[1], F = dout.dimensions()[1];
  const int64_t E = dw.dimensions()[0];
  const std::vector<int64_t> bounds = group_bounds(sizes, E, N);
  std::vector<Product<T>> tasks;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t first = bounds[e];
    add_tasks<T>(tasks, {D, F, bounds[e + 1] - first, rows.typed_data<T>() + first * D, 1, D,
                         dout.typed_data<T>() + first * F, F, 1, dw.typed_data<T>() + e * D * F, F});
  }
  run(pool, tasks);
}

ffi::Error grouped_matmul(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> sizes,
                          ffi::Result<ffi::AnyBuffer> out, bool transposed) {
  MOEJAX_REQUIRE(lhs.dimensions().size() == 2 && w.dimensions().size() == 3, "lhs must be [N, A], w [E, D, F]");
  const int64_t N = lhs.dimensions()[0], A = lhs.dimensions()[1], E = w.dimensions()[0];
  MOEJAX_REQUIRE(w.dimensions()[transposed ? 2 : 1] == A, "the width of lhs is not that of w");
  MOEJAX_REQUIRE(has_shape(*out, {N, w.dimensions()[transposed ? 1 : 2]}), "the result must be [N, B]");
  MOEJAX_REQUIRE(has_shape(sizes, {E}), "group sizes must be [E]");
  MOEJAX_REQUIRE(w.element_type() == lhs.element_type() && out->element_type() == lhs.element_type(),
                 "operands and result must have one dtype");
  switch (lhs.element_type()) {
    case ffi::F32:
      rowwise<float>(pool, lhs, w, sizes.typed_data(), transposed, *out);
      return ffi::Error::Success();
    case ffi::F64:
      rowwise<double>(pool, lhs, w, sizes.typed_data(), transposed, *out);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("moejax: products must be f32 or f64");
  }
}

ffi::Error grouped_matmul_drhs(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer dout,
                               ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> dw) {
  MOEJAX_REQUIRE(rows.dimensions().size() == 2 && dout.dimensions().size() == 2, "rows must be [N, D], dout [N, F]");
  MOEJAX_REQUIRE(rows.dimensions()[0] == dout.dimensions()[0], "rows and dout must have as many rows");
  MOEJAX_REQUIRE(sizes.dimensions().size() == 1, "group sizes must be [E]");
  MOEJAX_REQUIRE(has_shape(*dw, {sizes.dimensions()[0], rows.dimensions()[1], dout.dimensions()[1]}),
                 "the result must be [E, D, F]");
  MOEJAX_REQUIRE(dout.element_type() == rows.element_type() && dw->element_type() == rows.element_type(),
                 "operands and result must have one dtype");
  switch (rows.element_type()) {
    case ffi::F32:
      columnwise<float>(pool, rows, dout, sizes.typed_data(), *dw);
      return ffi::Error::Success();
    case ffi::F64:
      columnwise<double>(pool, rows, dout, sizes.typed_data(), *dw);
      return ffi::Error::Success();
    default:
      return ffi::Error::InvalidArgument("moejax: products must be f32 or f64");
  }
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped_matmul, moejax::grouped_matmul,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()               // lhs_NA
                                  .Arg<xla::ffi::AnyBuffer>()               // w_EDF
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [E]
                                  .Ret<xla::ffi::AnyBuffer>()               // out_NB
                                  .Attr<bool>("transposed"));               // times w transposed

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped_matmul_drhs, moejax::grouped_matmul_drhs,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()               // rows_ND
                                  .Arg<xla::ffi::AnyBuffer>()               // dout_NF
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [E]
                                  .Ret<xla::ffi::AnyBuffer>());             // dw_EDF
