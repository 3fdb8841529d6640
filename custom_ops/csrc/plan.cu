// The row order of a dispatch level on NVIDIA GPUs: a stable counting sort in five launches. Shapes: T tokens, K
// choices, P destinations, N rows, C chunks of tokens; see custom_ops/plan.py.
//
//   count    a warp per chunk counts its choices per destination
//   prefix   a block per destination: rows of it before each chunk
//   starts   one block: the first row of every destination
//   assign   a warp per chunk gives every choice its row, in order
//   clear    rows that no choice has
//
// A warp goes through its choices in order, 32 at a time, and ranks those of one destination among each other by
// comparing lanes; so the order is stable and no result depends on which warp runs first.
#include "cuda.h"

namespace moejax {
namespace {

constexpr int kMaxDestinations = 4096;
constexpr int kSharedCounters = 8192;  // 32 KiB per block, shared by its warps

struct Shape {
  int64_t T, chunk_tokens, N, bucket_rows;  // bucket_rows: -1 if rows are packed
  int K, P, C;
  bool unique;
};

// Per destination and chunk the rows counted, then those before the chunk; then per destination where its rows begin;
// then per chunk the invalid destinations.
struct Workspace {
  int32_t* before_PC;
  int32_t* start_P;
  int32_t* invalid_C;
};

__device__ bool is_valid(int32_t destination, int P) { return destination >= 0 && destination < P; }

// The first choice of a token with this choice's destination: the one that has a row.
__device__ int first_same(const int32_t* __restrict__ to, const Shape& shape, int64_t m) {
  const int k = static_cast<int>(m % shape.K);
  if (!shape.unique) return k;
  int first = 0;
  while (to[m - k + first] != to[m]) ++first;
  return first;
}

struct Chunk {
  int64_t begin, end;  // choices
};
__device__ Chunk chunk_of(const Shape& shape, int c) {
  const int64_t begin = min(c * shape.chunk_tokens, shape.T), end = min(begin + shape.chunk_tokens, shape.T);
  return {begin * shape.K, end * shape.K};
}

// Lanes that hold the same destination as this one, among those that hold one.
__device__ unsigned lanes_alike(bool has_row, int32_t destination) {
  const unsigned with_row = __ballot_sync(~0u, has_row);
  return __match_any_sync(~0u, has_row ? destination : -1) & with_row;
}

__global__ void count(const int32_t* __restrict__ to, Shape shape, Workspace work) {
  extern __shared__ int32_t counters[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int c = blockIdx.x * (blockDim.x / kWarp) + warp;
  if (c >= shape.C) return;
  int32_t* counts_P = counters + warp * shape.P;
  for (int p = lane; p < shape.P; p += kWarp) counts_P[p] = 0;
  __syncwarp();
  int invalid = 0;
  const Chunk chunk = chunk_of(shape, c);
  for (int64_t base = chunk.begin; base < chunk.end; base += kWarp) {
    const int64_t m = base + lane;
    const int32_t p = m < chunk.end ? to[m] : -1;
    const bool has_row = is_valid(p, shape.P) && first_same(to, shape, m) == m % shape.K;
    invalid += !is_valid(p, shape.P) && p != -1;
    const unsigned alike = lanes_alike(has_row, p);
    if (has_row && lane == __ffs(alike) - 1) counts_P[p] += __popc(alike);
    __syncwarp();
  }
  for (int p = lane; p < shape.P; p += kWarp) work.before_PC[int64_t(p) * shape.C + c] = counts_P[p];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) invalid += __shfl_down_sync(~0u, invalid, distance);
  if (lane == 0) work.invalid_C[c] = invalid;
}

// Sum of the values of all threads before this one, and of all threads. Every thread of the block must call it.
__device__ int32_t block_prefix(int32_t value, int32_t* total) {
  __shared__ int32_t sums[kBlockThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int32_t inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int32_t before = __shfl_up_sync(~0u, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == kWarp - 1) sums[warp] = inclusive;
  __syncthreads();
  int32_t before_warp = 0, all = 0;
  for (int w = 0; w < kBlockThreads / kWarp; ++w) {
    before_warp += w < warp ? sums[w] : 0;
    all += sums[w];
  }
  __syncthreads();  // before the next call writes
  *total = all;
  return before_warp + inclusive - value;
}

// values[i] becomes the sum of those before it; the result is the sum of all.
__device__ int32_t prefix_in_place(int32_t* values, int count) {
  int32_t running = 0;
  for (int base = 0; base < count; base += kBlockThreads) {
    const int i = base + threadIdx.x;
    const int32_t value = i < count ? values[i] : 0;
    int32_t total;
    const int32_t before = block_prefix(value, &total);
    if (i < count) values[i] = running + before;
    running += total;
  }
  return running;
}

__global__ void prefix(Shape shape, Workspace work) {
  const int32_t total = prefix_in_place(work.before_PC + int64_t(blockIdx.x) * shape.C, shape.C);
  if (threadIdx.x == 0) work.start_P[blockIdx.x] = total;
}

__global__ void starts(Shape shape, Workspace work, int32_t* __restrict__ sizes_P, int32_t* __restrict__ num_invalid) {
  const bool packed = shape.bucket_rows < 0;
  for (int p = threadIdx.x; p < shape.P; p += kBlockThreads) {
    const int64_t rows = work.start_P[p];
    sizes_P[p] = static_cast<int32_t>(packed ? rows : min(rows, shape.bucket_rows));
  }
  __syncthreads();
  if (packed) {
    prefix_in_place(work.start_P, shape.P);
  } else {
    for (int p = threadIdx.x; p < shape.P; p += kBlockThreads) {
      work.start_P[p] = static_cast<int32_t>(p * shape.bucket_rows);
    }
  }
  const int32_t invalid = prefix_in_place(work.invalid_C, shape.C);
  if (threadIdx.x == 0) *num_invalid = invalid;
}

__global__ void assign(const int32_t* __restrict__ to, Shape shape, Workspace work, int32_t* position_TK,
                       int32_t* __restrict__ choice_N, bool* __restrict__ served_TK) {
  extern __shared__ int32_t counters[];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int c = blockIdx.x * (blockDim.x / kWarp) + warp;
  if (c >= shape.C) return;
  int32_t* ranks_P = counters + warp * shape.P;  // the next choice's among all rows of a destination
  for (int p = lane; p < shape.P; p += kWarp) ranks_P[p] = work.before_PC[int64_t(p) * shape.C + c];
  __syncwarp();
  const Chunk chunk = chunk_of(shape, c);
  for (int64_t base = chunk.begin; base < chunk.end; base += kWarp) {
    const int64_t m = base + lane;
    const int32_t p = m < chunk.end ? to[m] : -1;
    const bool has_row = is_valid(p, shape.P) && first_same(to, shape, m) == m % shape.K;
    const unsigned alike = lanes_alike(has_row, p);
    const int32_t rank = has_row ? ranks_P[p] + __popc(alike & ((1u << lane) - 1)) : 0;
    __syncwarp();  // all have read before one adds
    if (has_row && lane == __ffs(alike) - 1) ranks_P[p] += __popc(alike);
    __syncwarp();
    const bool fits = has_row && (shape.bucket_rows < 0 || rank < shape.bucket_rows);
    const int32_t row = fits ? work.start_P[p] + rank : -1;
    if (fits) choice_N[row] = static_cast<int32_t>(m);
    if (m < chunk.end) {
      position_TK[m] = row;
      served_TK[m] = fits;
    }
  }
  if (!shape.unique) return;
  __syncwarp();  // positions of this chunk, which has whole tokens, are seen by all its lanes
  for (int64_t m = chunk.begin + lane; m < chunk.end; m += kWarp) {
    if (is_valid(to[m], shape.P)) served_TK[m] = position_TK[m - m % shape.K + first_same(to, shape, m)] >= 0;
  }
}

__global__ void clear(Shape shape, Workspace work, const int32_t* __restrict__ sizes_P,
                      int32_t* __restrict__ choice_N) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= shape.N) return;
  const int64_t p = shape.bucket_rows > 0 ? n / shape.bucket_rows : shape.P - 1;  // packed: only behind the last one
  if (n >= work.start_P[p] + sizes_P[p]) choice_N[n] = -1;
}

ffi::Error make_plan(cudaStream_t stream, ffi::Buffer<ffi::S32> dest, ffi::Result<ffi::Buffer<ffi::S32>> position,
                     ffi::Result<ffi::Buffer<ffi::S32>> choice, ffi::Result<ffi::Buffer<ffi::S32>> group_sizes,
                     ffi::Result<ffi::Buffer<ffi::PRED>> served, ffi::Result<ffi::Buffer<ffi::S32>> num_invalid,
                     ffi::Result<ffi::Buffer<ffi::S32>> workspace, int64_t bucket_rows, bool unique) {
  MOEJAX_REQUIRE(dest.dimensions().size() == 2 && dest.dimensions()[1] > 0, "destinations must be [T, K]");
  MOEJAX_REQUIRE(group_sizes->dimensions().size() == 1, "group sizes must be [P]");
  MOEJAX_REQUIRE(bucket_rows == -1 || bucket_rows > 0, "bucket_rows must be positive, or -1 for none");
  const int64_t T = dest.dimensions()[0], K = dest.dimensions()[1], P = group_sizes->dimensions()[0];
  MOEJAX_REQUIRE(P >= 1 && P <= kMaxDestinations, "destinations must be at most 4096");
  const int64_t N = bucket_rows == -1 ? T * K : P * bucket_rows;
  MOEJAX_REQUIRE(T * K < kMaxRows && N < kMaxRows, "there must be less than 2**31 rows");
  MOEJAX_REQUIRE(has_shape(*position, {T, K}) && has_shape(*served, {T, K}), "position and served must be [T, K]");
  MOEJAX_REQUIRE(has_shape(*choice, {N}), "the rows' choices must be [N]");
  // Of P * C + P + C numbers: how many chunks there are follows from what was given.
  const int64_t numbers = workspace->element_count(), C = (numbers - P) / (P + 1);
  MOEJAX_REQUIRE(T > 0 && C > 0 && numbers == P * C + P + C, "the workspace must hold PC + P + C numbers");

  int32_t* const base = workspace->typed_data();
  const Workspace work{base, base + P * C, base + P * C + P};
  const Shape shape{T, (T + C - 1) / C, N, bucket_rows, static_cast<int>(K), static_cast<int>(P), static_cast<int>(C),
                    unique};
  const int warps = std::clamp<int>(kSharedCounters / static_cast<int>(P), 1, kBlockThreads / kWarp);
  const unsigned blocks = blocks_for(C, warps), threads = warps * kWarp;
  const size_t shared = sizeof(int32_t) * warps * P;
  count<<<blocks, threads, shared, stream>>>(dest.typed_data(), shape, work);
  prefix<<<static_cast<unsigned>(P), kBlockThreads, 0, stream>>>(shape, work);
  starts<<<1, kBlockThreads, 0, stream>>>(shape, work, group_sizes->typed_data(), num_invalid->typed_data());
  assign<<<blocks, threads, shared, stream>>>(dest.typed_data(), shape, work, position->typed_data(),
                                              choice->typed_data(), served->typed_data());
  clear<<<blocks_for(N, kBlockThreads), kBlockThreads, 0, stream>>>(shape, work, group_sizes->typed_data(),
                                                                    choice->typed_data());
  return launched();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_make_plan, moejax::Guarded<moejax::make_plan>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // destinations [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // position [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // choice [N]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [P]
                                  .Ret<xla::ffi::Buffer<xla::ffi::PRED>>()  // served [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // number of invalid destinations []
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // workspace [P * C + P + C]
                                  .Attr<int64_t>("bucket_rows")             // B; -1: rows packed without buckets
                                  .Attr<bool>("unique"),                    // equal destinations share a row
                              {xla::ffi::Traits::kCmdBufferCompatible});
