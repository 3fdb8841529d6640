// The row order of a dispatch level on CPU: a counting sort. Shapes: T tokens, K choices, P destinations, N rows; see
// custom_ops/plan.py.
#include <algorithm>
#include <utility>
#include <vector>

#include "checks.h"
#include "parallel.h"

namespace moejax {
namespace {

// Tokens are cut into chunks that are counted side by side, each of at least as many choices as there are destinations to
// count. No result depends on where the cuts lie.
constexpr int64_t kChunkChoices = 1 << 14;
constexpr int64_t kMaxChunks = 64;

struct Chunk {
  std::vector<int64_t> counts;  // rows per destination, then the number of rows before this chunk's
  int64_t invalid = 0;
};

ffi::Error make_plan(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> dest, ffi::Result<ffi::Buffer<ffi::S32>> position,
                     ffi::Result<ffi::Buffer<ffi::S32>> choice, ffi::Result<ffi::Buffer<ffi::S32>> group_sizes,
                     ffi::Result<ffi::Buffer<ffi::PRED>> served, ffi::Result<ffi::Buffer<ffi::S32>> num_invalid,
                     ffi::Result<ffi::Buffer<ffi::S32>>, int64_t bucket_rows, bool unique) {
  MOEJAX_REQUIRE(dest.dimensions().size() == 2 && dest.dimensions()[1] > 0, "destinations must be [T, K]");
  MOEJAX_REQUIRE(group_sizes->dimensions().size() == 1, "group sizes must be [P]");
  MOEJAX_REQUIRE(bucket_rows == -1 || bucket_rows > 0, "bucket_rows must be positive, or -1 for none");
  const int64_t T = dest.dimensions()[0], K = dest.dimensions()[1], P = group_sizes->dimensions()[0];
  const bool packed = bucket_rows == -1;
  const int64_t N = packed ? T * K : P * bucket_rows;
  MOEJAX_REQUIRE(P > 0 && T * K < kMaxRows && N < kMaxRows, "there must be destinations, and less than 2**31 rows");
  MOEJAX_REQUIRE(has_shape(*position, {T, K}) && has_shape(*served, {T, K}), "position and served must be [T, K]");
  MOEJAX_REQUIRE(has_shape(*choice, {N}), "the rows' choices must be [N]");

  const int32_t* const to = dest.typed_data();
  int32_t* const position_TK = position->typed_data();
  int32_t* const choice_N = choice->typed_data();
  bool* const served_TK = served->typed_data();

  // The first choice of the same token with the same destination: the one that has a row.
  const auto first_same = [&](int64_t t, int64_t k) {
    if (!unique) return k;
    int64_t first = 0;
    while (to[t * K + first] != to[t * K + k]) ++first;
    return first;
  };
  const auto valid = [P](int32_t p) { return p >= 0 && p < P; };

  const int64_t num_chunks = std::clamp<int64_t>(T * K / std::max(kChunkChoices, P), 1, kMaxChunks);
  const int64_t chunk_tokens = (T + num_chunks - 1) / num_chunks;
  std::vector<Chunk> chunks(num_chunks);
  parallel_for(pool, num_chunks, [&](int64_t c) {
    Chunk& chunk = chunks[c];
    chunk.counts.assign(P, 0);
    for (int64_t t = c * chunk_tokens; t < std::min(T, (c + 1) * chunk_tokens); ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int32_t p = to[t * K + k];
        if (!valid(p)) {
          chunk.invalid += p != -1;
        } else if (first_same(t, k) == k) {
          ++chunk.counts[p];
        }
      }
    }
  });

  // Every destination's rows: where they begin, and how many stand before each chunk's.
  std::vector<int64_t> starts(P);
  int64_t start = 0;
  for (int64_t p = 0; p < P; ++p) {
    int64_t count = 0;
    for (Chunk& chunk : chunks) count += std::exchange(chunk.counts[p], count);
    starts[p] = packed ? start : p * bucket_rows;
    start += count;
    const int64_t kept = packed ? count : std::min(count, bucket_rows);
    group_sizes->typed_data()[p] = static_cast<int32_t>(kept);
    if (!packed) std::fill(choice_N + starts[p] + kept, choice_N + (p + 1) * bucket_rows, -1);
  }
  if (packed) std::fill(choice_N + start, choice_N + N, -1);
  int64_t invalid = 0;
  for (const Chunk& chunk : chunks) invalid += chunk.invalid;
  *num_invalid->typed_data() = static_cast<int32_t>(invalid);

  parallel_for(pool, num_chunks, [&](int64_t c) {
    std::vector<int64_t>& ranks = chunks[c].counts;
    for (int64_t t = c * chunk_tokens; t < std::min(T, (c + 1) * chunk_tokens); ++t) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t m = t * K + k;
        const int32_t p = to[m];
        position_TK[m] = -1;
        served_TK[m] = false;
        if (!valid(p)) continue;
        const int64_t first = first_same(t, k);
        if (first != k) {
          served_TK[m] = served_TK[t * K + first];
          continue;
        }
        const int64_t rank = ranks[p]++;
        if (!packed && rank >= bucket_rows) continue;
        position_TK[m] = static_cast<int32_t>(starts[p] + rank);
        choice_N[starts[p] + rank] = static_cast<int32_t>(m);
        served_TK[m] = true;
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace moejax

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_make_plan, moejax::Guarded<moejax::make_plan>::call,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()   // destinations [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // position [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // choice [N]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // group sizes [P]
                                  .Ret<xla::ffi::Buffer<xla::ffi::PRED>>()  // served [T, K]
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // number of invalid destinations []
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()   // workspace: none is needed here
                                  .Attr<int64_t>("bucket_rows")             // B; -1: rows packed without buckets
                                  .Attr<bool>("unique"));                   // equal destinations share a row
