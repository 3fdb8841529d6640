// Grouped matrix products on CPU. Shapes: N rows, E groups, D and F widths; see custom_ops/grouped_matmul.py.
#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace moejax {
namespace {

// Columns of C that one task computes, at most, and rows: enough to pay for packing its part of B, few enough that every
// thread gets several tasks. Rows are cut evenly, in multiples of a tile's.
constexpr int64_t kTaskCols = 256;
constexpr int64_t kMinTaskRows = 480;
constexpr int64_t kTasksPerThread = 8;
constexpr int64_t kTileRows = 12;

// Group e owns the rows bounds[e] .. bounds[e + 1] - 1; what exceeds N is cut off.
std::vector<int64_t> group_bounds(const int32_t* sizes, int64_t num_groups, int64_t num_rows) {
  std::vector<int64_t> bounds(num_groups + 1, 0);
  for (int64_t e = 0; e < num_groups; ++e) {
    bounds[e + 1] = std::min(num_rows, bounds[e] + std::max<int64_t>(0, sizes[e]));
  }
  return bounds;
}

// A product of which C is rounded to `Out`: its numbers are those of `c_out` with the strides of `of`.
template <typename T, typename Out>
struct Task {
  Product<T> of;
  Out* c_out;
};

// Cuts a product into tasks of at most so many rows, column blocks of the same rows next to each other.
template <typename T, typename Out>
void add_tasks(std::vector<Task<T, Out>>& tasks, const Task<T, Out>& whole, int64_t max_rows) {
  const int64_t rows = whole.of.rows, parts = std::max<int64_t>(1, (rows + max_rows - 1) / max_rows);
  const int64_t step = ((rows + parts - 1) / parts + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t row = 0; row < rows; row += step) {
    for (int64_t col = 0; col < whole.of.cols; col += kTaskCols) {
      Task<T, Out> part = whole;
      part.of.rows = std::min(step, rows - row);
      part.of.cols = std::min(kTaskCols, whole.of.cols - col);
      part.of.a += row * whole.of.a_row;
      part.of.b += col * whole.of.b_col;
      part.c_out += row * whole.of.c_row + col;
      tasks.push_back(part);
    }
  }
}

// Rows of a task, when all tasks together have `rows` rows of C.
template <typename Out, typename T>
int64_t task_rows(ffi::ThreadPool& pool, int64_t rows, int64_t cols) {
  // What is rounded afterwards should still lie in a cache by then.
  if (!std::is_same_v<Out, Wide<T>>) return kMinTaskRows;
  const int64_t column_blocks = (cols + kTaskCols - 1) / kTaskCols;
  return std::max(kMinTaskRows, rows * column_blocks / (kTasksPerThread * std::max<int64_t>(1, pool.num_threads())));
}

template <typename T, typename Out>
void run(ffi::ThreadPool& pool, const std::vector<Task<T, Out>>& tasks) {
  parallel_for(pool, tasks.size(), [&](int64_t i) {
    Product<T> product = tasks[i].of;
    if constexpr (std::is_same_v<Out, Wide<T>>) {
      product.c = tasks[i].c_out;
      kernels().of<T>().product(product);
    } else {
      thread_local const std::unique_ptr<Wide<T>[]> sums(new Wide<T>[(kMinTaskRows + kTileRows) * kTaskCols]);
      product.c = sums.get();
      product.c_row = kTaskCols;
      kernels().of<T>().product(product);
      for (int64_t row = 0; row < product.rows; ++row) {
        kernels().of<Out>().narrow(product.cols, product.c + row * kTaskCols, tasks[i].c_out + row * tasks[i].of.c_row);
      }
    }
  });
}

// out[N, B] = lhs[N, A] times its group's w[e], or w[e] transposed.
struct Rowwise {
  ffi::AnyBuffer lhs, w;
  const int32_t* sizes;
  bool transposed;

  template <typename T, typename Out>
  void operator()(ffi::ThreadPool& pool, ffi::AnyBuffer& out) const {
    const int64_t N = lhs.dimensions()[0], A = lhs.dimensions()[1], B = out.dimensions()[1];
    const int64_t E = w.dimensions()[0];
    const std::vector<int64_t> bounds = group_bounds(sizes, E, N);
    const int64_t max_rows = task_rows<Out, T>(pool, bounds[E], B);
    const T* rows = static_cast<const T*>(lhs.untyped_data());
    Out* to = static_cast<Out*>(out.untyped_data());
    std::vector<Task<T, Out>> tasks;
    for (int64_t e = 0; e < E; ++e) {
      const T* matrix = static_cast<const T*>(w.untyped_data()) + e * A * B;
      const Product<T> product{bounds[e + 1] - bounds[e], B, A, rows + bounds[e] * A, A, 1, matrix, transposed ? 1 : B,
                               transposed ? A : 1, nullptr, B};
      add_tasks<T, Out>(tasks, {product, to + bounds[e] * B}, max_rows);
    }
    run(pool, tasks);
    std::fill(to + bounds[E] * B, to + N * B, Out{});
  }
};

// dw[e] = rows of group e, transposed, times dout of group e.
struct Columnwise {
  ffi::AnyBuffer rows, dout;
  const int32_t* sizes;

  template <typename T, typename Out>
  void operator()(ffi::ThreadPool& pool, ffi::AnyBuffer& dw) const {
    const int64_t N = rows.dimensions()[0], D = rows.dimensions()[1], F = dout.dimensions()[1];
    const int64_t E = dw.dimensions()[0];
    const std::vector<int64_t> bounds = group_bounds(sizes, E, N);
    const int64_t max_rows = task_rows<Out, T>(pool, E * D, F);
    std::vector<Task<T, Out>> tasks;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t first = bounds[e];
      const Product<T> product{D, F, bounds[e + 1] - first, static_cast<const T*>(rows.untyped_data()) + first * D, 1, D,
                               static_cast<const T*>(dout.untyped_data()) + first * F, F, 1, nullptr, F};
      add_tasks<T, Out>(tasks, {product, static_cast<Out*>(dw.untyped_data()) + e * D * F}, max_rows);
    }
    run(pool, tasks);
  }
};

// Calls a product with the types of its operands and of its result, which is theirs or the one that sums are formed in.
template <typename Job>
ffi::Error by_dtype(ffi::ThreadPool& pool, ffi::DataType dtype, ffi::AnyBuffer& result, const Job& job) {
  const ffi::DataType to = result.element_type();
  const ffi::DataType wide = dtype == ffi::F64 ? ffi::F64 : ffi::F32;
  MOEJAX_REQUIRE(to == dtype || to == wide, "the result must have the operands' dtype, or f32");
  switch (dtype) {
    case ffi::F32: job.template operator()<float, float>(pool, result); break;
    case ffi::F64: job.template operator()<double, double>(pool, result); break;
    case ffi::BF16:
      to == wide ? job.template operator()<bf16, float>(pool, result) : job.template operator()<bf16, bf16>(pool, result);
      break;
    case ffi::F16:
      to == wide ? job.template operator()<f16, float>(pool, result) : job.template operator()<f16, f16>(pool, result);
      break;
    default: return ffi::Error::InvalidArgument("moejax: products must be bf16, f16, f32 or f64");
  }
  return ffi::Error::Success();
}

ffi::Error grouped_matmul(ffi::ThreadPool pool, ffi::AnyBuffer lhs, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> sizes,
                          ffi::Result<ffi::AnyBuffer> out, bool transposed) {
  MOEJAX_REQUIRE(lhs.dimensions().size() == 2 && w.dimensions().size() == 3, "lhs must be [N, A], w [E, D, F]");
  const int64_t N = lhs.dimensions()[0], A = lhs.dimensions()[1], E = w.dimensions()[0];
  MOEJAX_REQUIRE(w.dimensions()[transposed ? 2 : 1] == A, "the width of lhs is not that of w");
  MOEJAX_REQUIRE(has_shape(*out, {N, w.dimensions()[transposed ? 1 : 2]}), "the result must be [N, B]");
  MOEJAX_REQUIRE(has_shape(sizes, {E}), "group sizes must be [E]");
  MOEJAX_REQUIRE(w.element_type() == lhs.element_type(), "the operands must have one dtype");
  return by_dtype(pool, lhs.element_type(), *out, Rowwise{lhs, w, sizes.typed_data(), transposed});
}

ffi::Error grouped_matmul_drhs(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer dout,
                               ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> dw) {
  MOEJAX_REQUIRE(rows.dimensions().size() == 2 && dout.dimensions().size() == 2, "rows must be [N, D], dout [N, F]");
  MOEJAX_REQUIRE(rows.dimensions()[0] == dout.dimensions()[0], "rows and dout must have as many rows");
  MOEJAX_REQUIRE(sizes.dimensions().size() == 1, "group sizes must be [E]");
  MOEJAX_REQUIRE(has_shape(*dw, {sizes.dimensions()[0], rows.dimensions()[1], dout.dimensions()[1]}),
                 "the result must be [E, D, F]");
  MOEJAX_REQUIRE(dout.element_type() == rows.element_type(), "the operands must have one dtype");
  return by_dtype(pool, rows.element_type(), *dw, Columnwise{rows, dout, sizes.typed_data()});
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped_matmul, moejax::Guarded<moejax::grouped_matmul>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()               // lhs_NA
                                  .Arg<xla::ffi::AnyBuffer>()               // w_EDF
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [E]
                                  .Ret<xla::ffi::AnyBuffer>()               // out_NB
                                  .Attr<bool>("transposed"));               // times w transposed

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_grouped_matmul_drhs, moejax::Guarded<moejax::grouped_matmul_drhs>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()               // rows_ND
                                  .Arg<xla::ffi::AnyBuffer>()               // dout_NF
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [E]
                                  .Ret<xla::ffi::AnyBuffer>());             // dw_EDF
