// permute, unpermute and the fused backward of unpermute on NVIDIA GPUs. Shapes: T tokens, K choices, N rows, D width;
// see custom_ops/permute.py.
//
// A token is handled by whole warps of one block, each thread moving vectors of at most 16 bytes, the widest that
// divide a row. Every sum has a fixed order, and nothing is added atomically.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda.h"

namespace moejax {
namespace {

// Choices whose rows are read before the first is used, so that the reads wait for memory together.
constexpr int kTogether = 8;

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <typename T>
using wide_t = typename Wide<T>::type;

template <typename T>
__device__ wide_t<T> widen(T value) {
  return static_cast<wide_t<T>>(value);
}

// Lanes elements of T that are moved at once.
template <typename T, int Lanes>
struct alignas(sizeof(T) * Lanes) Vector {
  T lane[Lanes];
};

// Which token this thread works at, and on which of its vectors. x: along a row, y: tokens of the block.
struct Place {
  int64_t token;
  int first, step;
};
__device__ Place place() {
  return {int64_t(blockIdx.x) * blockDim.y + threadIdx.y, int(threadIdx.x), int(blockDim.x)};
}
struct Layout {
  dim3 grid, block;
};
Layout layout(int64_t tokens, int64_t vectors) {
  int lanes = kWarp;
  while (lanes < kBlockThreads && lanes < vectors) lanes *= 2;
  const int together = kBlockThreads / lanes;
  return {dim3(blocks_for(tokens, together)), dim3(lanes, together)};
}

// A plan of another shape must not make an access outside of the buffers.
__device__ bool exists(int32_t position, int64_t N) { return position >= 0 && position < N; }

template <typename V>
__global__ void zero_empty_rows(const int32_t* __restrict__ choice_N, V* __restrict__ rows, int64_t N, int vectors) {
  // A warp looks at 32 rows at once and then clears the empty ones together.
  const int lane = threadIdx.x % kWarp;
  const int64_t base = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp * kWarp;
  const bool empty = base + lane < N && choice_N[base + lane] < 0;
  for (unsigned left = __ballot_sync(~0u, empty); left; left &= left - 1) {
    V* row = rows + (base + __ffs(left) - 1) * vectors;
    for (int v = lane; v < vectors; v += kWarp) row[v] = V{};
  }
}

// Each token's row is read once and written to all its places.
template <typename V>
__global__ void copy_rows(const V* __restrict__ x, const int32_t* __restrict__ position_TK, V* __restrict__ rows,
                          int64_t T, int K, int64_t N, int vectors) {
  const Place at = place();
  if (at.token >= T) return;
  for (int v = at.first; v < vectors; v += at.step) {
    const V value = x[at.token * vectors + v];
    for (int k = 0; k < K; ++k) {
      const int32_t position = position_TK[at.token * K + k];
      if (exists(position, N)) rows[int64_t(position) * vectors + v] = value;
    }
  }
}

template <typename T, int Lanes>
__device__ Vector<T, Lanes> scaled(const Vector<T, Lanes>& value, wide_t<T> weight) {
  Vector<T, Lanes> result;
#pragma unroll
  for (int i = 0; i < Lanes; ++i) result.lane[i] = static_cast<T>(widen(value.lane[i]) * weight);
  return result;
}

template <typename T, int Lanes>
__global__ void copy_rows_weighted(const Vector<T, Lanes>* __restrict__ x, const int32_t* __restrict__ position_TK,
                                   const wide_t<T>* __restrict__ weights_TK, Vector<T, Lanes>* __restrict__ rows,
                                   int64_t tokens, int K, int64_t N, int vectors) {
  const Place at = place();
  if (at.token >= tokens) return;
  for (int v = at.first; v < vectors; v += at.step) {
    const Vector<T, Lanes> value = x[at.token * vectors + v];
    for (int64_t m = at.token * K; m < (at.token + 1) * K; ++m) {
      if (exists(position_TK[m], N)) rows[int64_t(position_TK[m]) * vectors + v] = scaled(value, weights_TK[m]);
    }
  }
}

// The rows of up to kTogether choices from m on; zeros where a choice has none.
template <typename V>
__device__ void read_rows(const V* __restrict__ rows, const int32_t* __restrict__ position_TK, int64_t m, int count,
                          int64_t N, int vectors, int v, V (&values)[kTogether], bool (&present)[kTogether]) {
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    const int32_t position = j < count ? position_TK[m + j] : -1;
    present[j] = exists(position, N);
    values[j] = present[j] ? rows[int64_t(position) * vectors + v] : V{};
  }
}

template <typename T, int Lanes>
__global__ void sum_rows(const Vector<T, Lanes>* __restrict__ rows, const int32_t* __restrict__ position_TK,
                         const wide_t<T>* __restrict__ weights_TK, Vector<T, Lanes>* __restrict__ y, int64_t tokens,
                         int K, int64_t N, int vectors) {
  const Place at = place();
  if (at.token >= tokens) return;
  for (int v = at.first; v < vectors; v += at.step) {
    wide_t<T> sum[Lanes] = {};
    for (int k = 0; k < K; k += kTogether) {
      const int64_t m = at.token * K + k;
      Vector<T, Lanes> values[kTogether];
      bool present[kTogether];
      read_rows(rows, position_TK, m, min(K - k, kTogether), N, vectors, v, values, present);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (!present[j]) continue;
        const wide_t<T> weight = weights_TK ? weights_TK[m + j] : wide_t<T>(1);
#pragma unroll
        for (int i = 0; i < Lanes; ++i) sum[i] += weight * widen(values[j].lane[i]);
      }
    }
    Vector<T, Lanes> result;
#pragma unroll
    for (int i = 0; i < Lanes; ++i) result.lane[i] = static_cast<T>(sum[i]);
    y[at.token * vectors + v] = result;
  }
}

// drows[row of a choice] = weight * dy[token], and dots[choice] = <row of the choice, dy[token]>, in one pass.
template <typename T, int Lanes>
__global__ void scatter_and_dot(const Vector<T, Lanes>* __restrict__ rows, const Vector<T, Lanes>* __restrict__ dy,
                                const int32_t* __restrict__ position_TK, const wide_t<T>* __restrict__ weights_TK,
                                Vector<T, Lanes>* __restrict__ drows, wide_t<T>* __restrict__ dots_TK, int64_t tokens,
                                int K, int64_t N, int vectors) {
  __shared__ wide_t<T> of_warp[kBlockThreads / kWarp][kTogether];
  const Place at = place();
  const int warps_of_token = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  const int first_warp = threadIdx.y * warps_of_token, warp = first_warp + threadIdx.x / kWarp;
  for (int k = 0; k < K; k += kTogether) {  // as often for every thread of the block: they meet below
    const int count = at.token < tokens ? min(K - k, kTogether) : 0;
    const int64_t m = at.token * K + k;
    wide_t<T> dot[kTogether] = {};
    for (int v = at.first; count > 0 && v < vectors; v += at.step) {
      const Vector<T, Lanes> from = dy[at.token * vectors + v];
      Vector<T, Lanes> values[kTogether];
      bool present[kTogether];
      read_rows(rows, position_TK, m, count, N, vectors, v, values, present);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (!present[j]) continue;
#pragma unroll
        for (int i = 0; i < Lanes; ++i) dot[j] += widen(values[j].lane[i]) * widen(from.lane[i]);
        drows[int64_t(position_TK[m + j]) * vectors + v] = scaled(from, weights_TK[m + j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        dot[j] += __shfl_down_sync(~0u, dot[j], distance);
      }
      if (lane == 0) of_warp[warp][j] = dot[j];
    }
    __syncthreads();
    if (threadIdx.x < count) {
      wide_t<T> sum = 0;
      for (int w = 0; w < warps_of_token; ++w) sum += of_warp[first_warp + w][threadIdx.x];
      dots_TK[m + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

// A number that every power of two divides which divides the length of a row and the addresses of all rows: XLA may hand
// over a part of a larger buffer, which need not begin at a multiple of 16 bytes.
template <typename... Pointers>
int64_t alignment(int64_t row_bytes, Pointers... rows) {
  return (row_bytes | ... | static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows)));
}

// Calls f with a null pointer to the widest type of at most 16 bytes that rows can be moved in.
template <typename F>
void with_widest(int64_t aligned, const F& f) {
  if (aligned % 16 == 0) return f(static_cast<Vector<uint32_t, 4>*>(nullptr));
  if (aligned % 8 == 0) return f(static_cast<Vector<uint32_t, 2>*>(nullptr));
  if (aligned % 4 == 0) return f(static_cast<uint32_t*>(nullptr));
  if (aligned % 2 == 0) return f(static_cast<uint16_t*>(nullptr));
  return f(static_cast<uint8_t*>(nullptr));
}

// Calls f with a null pointer to the widest vector of T of at most 16 bytes that rows can be moved in.
template <typename T, int Lanes = 16 / sizeof(T), typename F>
void with_vectors(int64_t aligned, const F& f) {
  if constexpr (Lanes > 1) {
    if (aligned % (Lanes * sizeof(T)) != 0) return with_vectors<T, Lanes / 2>(aligned, f);
  }
  f(static_cast<Vector<T, Lanes>*>(nullptr));
}

// As with_vectors, by the buffers' dtype; the weights belonging to T are of type wide_t<T>.
template <typename F>
ffi::Error by_dtype(ffi::DataType dtype, ffi::DataType weights_dtype, int64_t aligned, const F& f) {
  const bool is_double = dtype == ffi::F64;
  MOEJAX_REQUIRE(weights_dtype == (is_double ? ffi::F64 : ffi::F32), "weights must be f32, or f64 beside f64");
  switch (dtype) {
    case ffi::BF16: with_vectors<__nv_bfloat16>(aligned, f); break;
    case ffi::F16: with_vectors<__half>(aligned, f); break;
    case ffi::F32: with_vectors<float>(aligned, f); break;
    case ffi::F64: with_vectors<double>(aligned, f); break;
    default: return ffi::Error::InvalidArgument("moejax: rows must be bf16, f16, f32 or f64");
  }
  return launched();
}

template <typename T, int Lanes>
T element_of(Vector<T, Lanes>*);

void clear_empty(cudaStream_t stream, const ffi::Buffer<ffi::S32>& choice, void* rows, int64_t row_bytes) {
  const int64_t N = choice.element_count();
  with_widest(alignment(row_bytes, rows), [&](auto* vector) {
    using V = std::remove_pointer_t<decltype(vector)>;
    zero_empty_rows<V><<<blocks_for(N, kBlockThreads), kBlockThreads, 0, stream>>>(
        choice.typed_data(), static_cast<V*>(rows), N, static_cast<int>(row_bytes / sizeof(V)));
  });
}

ffi::Error permute(cudaStream_t stream, ffi::AnyBuffer x, ffi::Buffer<ffi::S32> position, ffi::Buffer<ffi::S32> choice,
                   ffi::AnyBuffer weights, ffi::Result<ffi::AnyBuffer> rows) {
  MOEJAX_REQUIRE(x.dimensions().size() == 2 && position.dimensions().size() == 2, "x must be [T, D], position [T, K]");
  const int64_t T = x.dimensions()[0], D = x.dimensions()[1], N = choice.element_count();
  const int K = static_cast<int>(position.dimensions()[1]);
  MOEJAX_REQUIRE(position.dimensions()[0] == T, "x and position must have as many tokens");
  MOEJAX_REQUIRE(has_shape(*rows, {N, D}) && rows->element_type() == x.element_type(), "rows must be [N, D], as x");
  MOEJAX_REQUIRE(is_whole_bytes(x.element_type()), "x must be of a dtype of at least 8 bits");
  const int64_t row_bytes = D * ffi::ByteWidth(x.element_type());
  MOEJAX_REQUIRE(N < kMaxRows, "there must be less than 2**31 rows");
  if (N == 0 || D == 0) return ffi::Error::Success();
  const int64_t aligned = alignment(row_bytes, x.untyped_data(), rows->untyped_data());
  clear_empty(stream, choice, rows->untyped_data(), row_bytes);
  if (T == 0) return launched();
  if (weights.element_count() > 0) {
    MOEJAX_REQUIRE(has_shape(weights, {T, K}), "weights must be [T, K]");
    return by_dtype(x.element_type(), weights.element_type(), aligned, [&](auto* vector) {
      using V = std::remove_pointer_t<decltype(vector)>;
      using W = wide_t<decltype(element_of(vector))>;
      const int vectors = static_cast<int>(row_bytes / sizeof(V));
      const Layout threads = layout(T, vectors);
      copy_rows_weighted<<<threads.grid, threads.block, 0, stream>>>(
          static_cast<const V*>(x.untyped_data()), position.typed_data(), static_cast<const W*>(weights.untyped_data()),
          static_cast<V*>(rows->untyped_data()), T, K, N, vectors);
    });
  }
  with_widest(aligned, [&](auto* vector) {
    using V = std::remove_pointer_t<decltype(vector)>;
    const int vectors = static_cast<int>(row_bytes / sizeof(V));
    const Layout threads = layout(T, vectors);
    copy_rows<V><<<threads.grid, threads.block, 0, stream>>>(static_cast<const V*>(x.untyped_data()),
                                                             position.typed_data(),
                                                             static_cast<V*>(rows->untyped_data()), T, K, N, vectors);
  });
  return launched();
}

ffi::Error unpermute(cudaStream_t stream, ffi::AnyBuffer rows, ffi::Buffer<ffi::S32> position, ffi::AnyBuffer weights,
                     ffi::Result<ffi::AnyBuffer> y) {
  MOEJAX_REQUIRE(rows.dimensions().size() == 2 && position.dimensions().size() == 2,
                 "rows must be [N, D], position [T, K]");
  const int64_t N = rows.dimensions()[0], D = rows.dimensions()[1], T = position.dimensions()[0];
  const int K = static_cast<int>(position.dimensions()[1]);
  MOEJAX_REQUIRE(has_shape(*y, {T, D}) && y->element_type() == rows.element_type(), "y must be [T, D], as the rows");
  const bool weighted = weights.element_count() > 0;
  MOEJAX_REQUIRE(!weighted || has_shape(weights, {T, K}), "weights must be [T, K]");
  if (T == 0 || D == 0) return ffi::Error::Success();
  const int64_t row_bytes = D * ffi::ByteWidth(rows.element_type());
  const int64_t aligned = alignment(row_bytes, rows.untyped_data(), y->untyped_data());
  return by_dtype(rows.element_type(), weights.element_type(), aligned, [&](auto* vector) {
    using V = std::remove_pointer_t<decltype(vector)>;
    using W = wide_t<decltype(element_of(vector))>;
    const int vectors = static_cast<int>(row_bytes / sizeof(V));
    const Layout threads = layout(T, vectors);
    sum_rows<<<threads.grid, threads.block, 0, stream>>>(
        static_cast<const V*>(rows.untyped_data()), position.typed_data(),
        weighted ? static_cast<const W*>(weights.untyped_data()) : static_cast<const W*>(nullptr),
        static_cast<V*>(y->untyped_data()), T, K, N, vectors);
  });
}

ffi::Error unpermute_backward(cudaStream_t stream, ffi::AnyBuffer rows, ffi::AnyBuffer dy,
                              ffi::Buffer<ffi::S32> position, ffi::Buffer<ffi::S32> choice, ffi::AnyBuffer weights,
                              ffi::Result<ffi::AnyBuffer> drows, ffi::Result<ffi::AnyBuffer> dweights) {
  MOEJAX_REQUIRE(dy.dimensions().size() == 2 && position.dimensions().size() == 2,
                 "dy must be [T, D], position [T, K]");
  const int64_t T = dy.dimensions()[0], D = dy.dimensions()[1], N = choice.element_count();
  const int K = static_cast<int>(position.dimensions()[1]);
  MOEJAX_REQUIRE(position.dimensions()[0] == T, "dy and position must have as many tokens");
  MOEJAX_REQUIRE(has_shape(rows, {N, D}) && has_shape(*drows, {N, D}), "rows must be [N, D]");
  MOEJAX_REQUIRE(has_shape(weights, {T, K}) && has_shape(*dweights, {T, K}), "weights must be [T, K]");
  MOEJAX_REQUIRE(dy.element_type() == rows.element_type() && drows->element_type() == rows.element_type(),
                 "rows, dy and drows must have one dtype");
  MOEJAX_REQUIRE(dweights->element_type() == weights.element_type(), "weights and their gradient must have one dtype");
  const int64_t row_bytes = D * ffi::ByteWidth(dy.element_type());
  if (N > 0 && D > 0) clear_empty(stream, choice, drows->untyped_data(), row_bytes);
  if (T == 0) return launched();
  const int64_t aligned = alignment(row_bytes, rows.untyped_data(), dy.untyped_data(), drows->untyped_data());
  return by_dtype(rows.element_type(), weights.element_type(), aligned, [&](auto* vector) {
    using V = std::remove_pointer_t<decltype(vector)>;
    using W = wide_t<decltype(element_of(vector))>;
    const int vectors = static_cast<int>(row_bytes / sizeof(V));
    const Layout threads = layout(T, vectors);
    scatter_and_dot<<<threads.grid, threads.block, 0, stream>>>(
        static_cast<const V*>(rows.untyped_data()), static_cast<const V*>(dy.untyped_data()), position.typed_data(),
        static_cast<const W*>(weights.untyped_data()), static_cast<V*>(drows->untyped_data()),
        static_cast<W*>(dweights->untyped_data()), T, K, N, vectors);
  });
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_permute, moejax::Guarded<moejax::permute>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()              // x [T, D], any dtype without weights
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>(),             // rows [N, D]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute, moejax::Guarded<moejax::unpermute>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K], or [0, 0] for none
                                  .Ret<xla::ffi::AnyBuffer>(),             // y [T, D]
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_unpermute_backward, moejax::Guarded<moejax::unpermute_backward>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::AnyBuffer>()              // rows [N, D]
                                  .Arg<xla::ffi::AnyBuffer>()              // dy [T, D]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // position [T, K]
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()  // choice [N]
                                  .Arg<xla::ffi::AnyBuffer>()              // weights [T, K]
                                  .Ret<xla::ffi::AnyBuffer>()              // drows [N, D]
                                  .Ret<xla::ffi::AnyBuffer>(),             // dweights [T, K]
                              {xla::ffi::Traits::kCmdBufferCompatible});
