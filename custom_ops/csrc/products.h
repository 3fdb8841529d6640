// Matrix products of one task, blocked for the caches. Included once per instruction set, by kernels.cc.
#pragma once

#include <algorithm>
#include <new>
#include <utility>

#include "vectors.h"

namespace moejax::MOEJAX_ISA {
namespace {

// A tile of C is kTileRows x 2 vectors, held in registers: 24 of AVX-512's 32, 12 of the 16 that others have.
constexpr int kTileRows = MOEJAX_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
// A block of B, packed, fills about half of a second-level cache; a tile's rows of A stay in the first level.
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kBlockCols = 256;

// Packing buffers of one thread, kept for its life. W is float or double.
template <typename W>
struct Buffers {
  static constexpr int64_t kPanelCols = kTileVectors * kLanes<W>;
  W* b = allocate(kBlockDepth * (kBlockCols + kPanelCols));
  W* a = allocate((kBlockDepth + kLanes<W>) * kTileRows);

  ~Buffers() {
    ::operator delete[](b, std::align_val_t(64));
    ::operator delete[](a, std::align_val_t(64));
  }

  static W* allocate(int64_t count) {
    return static_cast<W*>(::operator new[](count * sizeof(W), std::align_val_t(64)));
  }
};

template <typename W>
Buffers<W>& buffers() {
  thread_local Buffers<W> mine;
  return mine;
}

// ---- The tile --------------------------------------------------------------------------------------------------------

// C[MR, cols] (+)= A[MR, depth] * panel[depth, NV vectors]. A(r, k) is a[r * a_row + k] with kRowMajor, or packed as
// a[k * MR + r]. The panel's columns beyond `cols` are computed and not stored.
template <typename W, int MR, int NV, bool kRowMajor>
void tile(int64_t depth, const W* a, int64_t a_row, const W* panel, W* c, int64_t c_row, int64_t cols, bool add) {
  using V = Vector<W>;
  constexpr int64_t L = kLanes<W>;
  V sum[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load(panel + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const W left = kRowMajor ? a[r * a_row + k] : a[k * MR + r];
      for (int v = 0; v < NV; ++v) sum[r][v] += left * b[v];
    }
    panel += NV * L;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r, c += c_row) {
    if (cols == NV * L) {
      for (int v = 0; v < NV; ++v) store(c + v * L, add ? load(c + v * L) + sum[r][v] : sum[r][v]);
    } else {
      W line[NV * L];
      for (int v = 0; v < NV; ++v) store(line + v * L, sum[r][v]);
      for (int64_t j = 0; j < cols; ++j) c[j] = add ? c[j] + line[j] : line[j];
    }
  }
}

template <typename W, int MR, bool kRowMajor>
void tile_row(const W* a, int64_t a_row, int64_t depth, const W* packed, int64_t cols, W* c, int64_t c_row, bool add) {
  constexpr int64_t L = kLanes<W>;
  for (int64_t first = 0; first < cols;) {
    const int64_t left = cols - first;
    if (left > L) {
      tile<W, MR, 2, kRowMajor>(depth, a, a_row, packed, c + first, c_row, std::min(left, 2 * L), add);
      packed += depth * 2 * L;
      first += 2 * L;
    } else {
      tile<W, MR, 1, kRowMajor>(depth, a, a_row, packed, c + first, c_row, left, add);
      first += L;
    }
  }
}

// ---- Packing ---------------------------------------------------------------------------------------------------------

// Of a and b alternately one number each, from the first half of both (kHalf = 0) or from the second.
template <int kHalf, typename V, std::size_t... I>
inline V interleave(const V& a, const V& b, std::index_sequence<I...>) {
  constexpr auto n = sizeof...(I);
#ifdef __clang__
  return __builtin_shufflevector(a, b, ((I % 2) * n + kHalf * n / 2 + I / 2)...);
#else
  using Index = std::conditional_t<sizeof(a[0]) == 4, int32_t, int64_t>;
  typedef Index Mask __attribute__((vector_size(sizeof(V))));
  return __builtin_shuffle(a, b, Mask{Index((I % 2) * n + kHalf * n / 2 + I / 2)...});
#endif
}

// Transposes a square of as many rows as a vector has lanes: every step interleaves the first half of the rows with the
// second, which rotates the bits of (row, lane) by one.
template <typename W>
inline void transpose(Vector<W> (&rows)[kLanes<W>]) {
  constexpr int64_t L = kLanes<W>;
  constexpr auto lanes = std::make_index_sequence<L>();
#pragma GCC unroll 4
  for (int64_t step = 1; step < L; step *= 2) {
    Vector<W> next[L];
#pragma GCC unroll 16
    for (int64_t i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<0>(rows[i], rows[i + L / 2], lanes);
      next[2 * i + 1] = interleave<1>(rows[i], rows[i + L / 2], lanes);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// packed[k * width + j] = b[j * b_col + k] for k < depth and j < kLanes; 0 for j >= there.
template <typename T>
void pack_transposed(const T* b, int64_t b_col, int64_t depth, int64_t there, Wide<T>* packed, int64_t width) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t k = 0; k < depth; k += L) {
    const int64_t count = std::min(L, depth - k);
    Vector<T> square[L];
#pragma GCC unroll 16
    for (int64_t j = 0; j < L; ++j) square[j] = j < there ? load_part(b + j * b_col + k, count) : Vector<T>{};
    transpose<Wide<T>>(square);
    for (int64_t i = 0; i < count; ++i) store(packed + (k + i) * width, square[i]);
  }
}

// Columns [0, cols) of B's rows [0, depth) as panels, one behind the other, each [depth, 2 vectors] but for a last one
// of a single vector where that is enough; columns that B does not have are 0.
template <typename T>
void pack_b(const T* b, int64_t b_depth, int64_t b_col, int64_t depth, int64_t cols, Wide<T>* packed) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t first = 0; first < cols;) {
    const int64_t left = cols - first, width = left > L ? kTileVectors * L : L;
    if (b_col == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = b + k * b_depth + first;
        Wide<T>* to = packed + k * width;
        if (left >= width) {
          for (int64_t v = 0; v < width; v += L) store(to + v, load(from + v));
        } else {
          for (int64_t v = 0; v < width; v += L) store(to + v, load_part(from + v, std::min(left - v, L)));
        }
      }
    } else {
      for (int64_t v = 0; v < width; v += L) {
        pack_transposed(b + (first + v) * b_col, b_col, depth, std::min(left - v, L), packed + v, width);
      }
    }
    packed += depth * width;
    first += width;
  }
}

// lines[k * MR + r] = a[k * a_depth + r] for k < depth, r < MR; every line of a has `there` numbers from here on.
template <typename T, int MR>
void pack_lines(const T* a, int64_t a_depth, int64_t depth, int64_t there, Wide<T>* lines) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < MR; r += L) {
      const T* from = a + k * a_depth + r;
      // A whole vector where memory goes on: what it holds too much is written over by the next line, or never read.
      const bool whole = (depth - 1 - k) * a_depth + there - r >= L;
      store(lines + k * MR + r, whole ? load(from) : load_part(from, std::min<int64_t>(MR - r, L)));
    }
  }
}

// MR rows of C. A is taken as it lies where its depth is contiguous and its numbers are wide; else it is packed first.
template <typename T, int MR>
void rows_of_tiles(const Product<T>& p, int64_t row, int64_t k, int64_t depth, const Wide<T>* packed, int64_t col,
                   int64_t cols) {
  using W = Wide<T>;
  const T* a = p.a + row * p.a_row + k * p.a_depth;
  W* c = p.c + row * p.c_row + col;
  if (p.a_depth != 1) {
    W* lines = buffers<W>().a;
    pack_lines<T, MR>(a, p.a_depth, depth, p.rows - row, lines);
    return tile_row<W, MR, false>(lines, 0, depth, packed, cols, c, p.c_row, k > 0);
  }
  if constexpr (std::is_same_v<T, W>) {
    tile_row<W, MR, true>(a, p.a_row, depth, packed, cols, c, p.c_row, k > 0);
  } else {
    W* lines = buffers<W>().a;
    const int64_t lines_row = kBlockDepth + kLanes<T>;
    for (int r = 0; r < MR; ++r) {
      over_vectors<T>(depth, [&](int64_t j, int64_t count) {
        store_part(lines + r * lines_row + j, load_part(a + r * p.a_row + j, count), count);
      });
    }
    tile_row<W, MR, true>(lines, lines_row, depth, packed, cols, c, p.c_row, k > 0);
  }
}

template <typename T>
void product(const Product<T>& p) {
  if (p.depth == 0) {
    for (int64_t r = 0; r < p.rows; ++r) std::fill_n(p.c + r * p.c_row, p.cols, Wide<T>(0));
    return;
  }
  Wide<T>* packed = buffers<Wide<T>>().b;
  const int64_t depth_blocks = (p.depth + kBlockDepth - 1) / kBlockDepth;
  const int64_t depth_step = (p.depth + depth_blocks - 1) / depth_blocks;
  for (int64_t col = 0; col < p.cols; col += kBlockCols) {
    const int64_t cols = std::min(kBlockCols, p.cols - col);
    for (int64_t k = 0; k < p.depth; k += depth_step) {
      const int64_t depth = std::min(depth_step, p.depth - k);
      pack_b(p.b + k * p.b_depth + col * p.b_col, p.b_depth, p.b_col, depth, cols, packed);
      int64_t row = 0;
      for (; row + kTileRows <= p.rows; row += kTileRows) rows_of_tiles<T, kTileRows>(p, row, k, depth, packed, col, cols);
      if (kTileRows > 8 && row + 8 <= p.rows) rows_of_tiles<T, 8>(p, row, k, depth, packed, col, cols), row += 8;
      if (row + 4 <= p.rows) rows_of_tiles<T, 4>(p, row, k, depth, packed, col, cols), row += 4;
      if (row + 2 <= p.rows) rows_of_tiles<T, 2>(p, row, k, depth, packed, col, cols), row += 2;
      if (row < p.rows) rows_of_tiles<T, 1>(p, row, k, depth, packed, col, cols);
    }
  }
}

}  // namespace
}  // namespace moejax::MOEJAX_ISA
