// Compiled once per instruction set: MOEJAX_ISA is its namespace, MOEJAX_VECTOR_BYTES the width of its vectors.
//
// Vectors are the compiler's own (GCC, Clang), so one text serves SSE2, AVX2, AVX-512 and NEON.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>

namespace moejax::MOEJAX_ISA {
namespace {

template <typename T>
struct Vector;
template <>
struct Vector<float> {
  typedef float Type __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
  typedef double Type __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
};
typedef int32_t Int32s __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));

template <typename T>
constexpr int kLanes = MOEJAX_VECTOR_BYTES / sizeof(T);

template <typename T>
inline typename Vector<T>::Type load(const T* from) {
  typename Vector<T>::Type v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* to, const typename Vector<T>::Type& v) {
  std::memcpy(to, &v, sizeof(v));
}

// ---- Matrix products -----------------------------------------------------------------------------------------------

// A tile of C is kTileRows x 2 vectors, held in registers: 24 of AVX-512's 32, 12 of the 16 that others have.
constexpr int kTileRows = MOEJAX_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
// A block of B, packed, fills about half of a second-level cache; a tile's rows of A stay in the first level.
constexpr int64_t kBlockDepth = 512;
constexpr int64_t kBlockCols = 256;

// Packing buffers of one thread, kept for its life.
template <typename T>
struct Buffers {
  static constexpr int64_t kPanelCols = kTileVectors * kLanes<T>;
  T* b = allocate(kBlockDepth * (kBlockCols + kPanelCols));
  T* a = allocate(kBlockDepth * kTileRows);

  ~Buffers() {
    ::operator delete[](b, std::align_val_t(64));
    ::operator delete[](a, std::align_val_t(64));
  }

  static T* allocate(int64_t count) {
    return static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64)));
  }
};

template <typename T>
Buffers<T>& buffers() {
  thread_local Buffers<T> mine;
  return mine;
}

// C[MR, cols] (+)= A[MR, depth] * panel[depth, NV vectors]. A(r, k) is a[r * a_row + k] with kRowMajor, or packed as
// a[k * MR + r]. The panel's columns beyond `cols` are computed and not stored.
template <typename T, int MR, int NV, bool kRowMajor>
void tile(int64_t depth, const T* a, int64_t a_row, const T* panel, T* c, int64_t c_row, int64_t cols, bool add) {
  using V = typename Vector<T>::Type;
  constexpr int W = kLanes<T>;
  V sum[MR][NV] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V b[NV];
    for (int v = 0; v < NV; ++v) b[v] = load<T>(panel + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const T left = kRowMajor ? a[r * a_row + k] : a[k * MR + r];
      for (int v = 0; v < NV; ++v) sum[r][v] += left * b[v];
    }
    panel += NV * W;
  }
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r, c += c_row) {
    if (cols == NV * W) {
      for (int v = 0; v < NV; ++v) store<T>(c + v * W, add ? load<T>(c + v * W) + sum[r][v] : sum[r][v]);
    } else {
      T line[NV * W];
      for (int v = 0; v < NV; ++v) store<T>(line + v * W, sum[r][v]);
      for (int64_t j = 0; j < cols; ++j) c[j] = add ? c[j] + line[j] : line[j];
    }
  }
}

// Columns [0, cols) of B's rows [0, depth) as panels, one behind the other, each [depth, 2 vectors] but for a last one
// of a single vector where that is enough; columns that B does not have are 0.
template <typename T>
void pack_b(const T* b, int64_t b_depth, int64_t b_col, int64_t depth, int64_t cols, T* packed) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t first = 0; first < cols;) {
    const int64_t left = cols - first;
    const int64_t width = left > W ? kTileVectors * W : W;
    const int64_t there = std::min(left, width);
    if (b_col == 1) {
      for (int64_t k = 0; k < depth; ++k) {
        std::memcpy(packed + k * width, b + k * b_depth + first, there * sizeof(T));
        std::fill(packed + k * width + there, packed + (k + 1) * width, T(0));
      }
    } else {
      // Transposing: a few steps of depth at a time, so that the lines of B that were read stay in the cache.
      for (int64_t k0 = 0; k0 < depth; k0 += 16) {
        const int64_t k1 = std::min(depth, k0 + 16);
        for (int64_t k = k0; k < k1; ++k) {
          const T* from = b + first * b_col + k * b_depth;
          T* to = packed + k * width;
          for (int64_t j = 0; j < there; ++j) to[j] = from[j * b_col];
          for (int64_t j = there; j < width; ++j) to[j] = T(0);
        }
      }
    }
    packed += depth * width;
    first += width;
  }
}

template <typename T, int MR, bool kRowMajor>
void tile_row(const T* a, int64_t a_row, int64_t depth, const T* packed, int64_t cols, T* c, int64_t c_row, bool add) {
  constexpr int64_t W = kLanes<T>;
  for (int64_t first = 0; first < cols;) {
    const int64_t left = cols - first;
    if (left > W) {
      tile<T, MR, 2, kRowMajor>(depth, a, a_row, packed, c + first, c_row, std::min(left, 2 * W), add);
      packed += depth * 2 * W;
      first += 2 * W;
    } else {
      tile<T, MR, 1, kRowMajor>(depth, a, a_row, packed, c + first, c_row, left, add);
      first += W;
    }
  }
}

// MR rows of C, with A as it lies (a_depth == 1), or (a_row == 1) packed first.
template <typename T, int MR>
void rows_of_tiles(const Product<T>& p, int64_t row, int64_t k, int64_t depth, const T* packed, int64_t col,
                   int64_t cols) {
  const T* a = p.a + row * p.a_row + k * p.a_depth;
  T* c = p.c + row * p.c_row + col;
  if (p.a_depth == 1) {
    tile_row<T, MR, true>(a, p.a_row, depth, packed, cols, c, p.c_row, k > 0);
  } else {
    T* lines = buffers<T>().a;
    for (int64_t i = 0; i < depth; ++i) std::memcpy(lines + i * MR, a + i * p.a_depth, MR * sizeof(T));
    tile_row<T, MR, false>(lines, 0, depth, packed, cols, c, p.c_row, k > 0);
  }
}

template <typename T>
void product(const Product<T>& p) {
  if (p.depth == 0) {
    for (int64_t r = 0; r < p.rows; ++r) std::fill_n(p.c + r * p.c_row, p.cols, T(0));
    return;
  }
  T* packed = buffers<T>().b;
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

// ---- SwiGLU --------------------------------------------------------------------------------------------------------

inline double exponential(double x) { return std::exp(x); }

// exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2 and a Taylor polynomial of degree 7 (error below 6e-9); about 1 ulp.
inline Vector<float>::Type exponential(Vector<float>::Type x) {
  using V = Vector<float>::Type;
  const V low = V{} - 87.0f, high = V{} + 88.0f;
  // Comparisons are false for NaN, which therefore stays.
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V rounder = V{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  V n = x * 1.44269504088896341f + rounder;
  Int32s exponent;
  std::memcpy(&exponent, &n, sizeof(n));
  exponent = (exponent << 23) + (127 << 23);
  V scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  n -= rounder;
  // ln(2) in two parts, the first one exact in the product.
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * scale;
}

// Applies `f` to whole vectors of f32 where they fit, and to numbers in a vector of their own in the end.
template <typename F>
inline void over_vectors(int64_t width, const F& f) {
  constexpr int64_t W = kLanes<float>;
  int64_t j = 0;
  for (; j + W <= width; j += W) f(j, W);
  if (j < width) f(j, width - j);
}

inline Vector<float>::Type load_part(const float* from, int64_t count) {
  if (count == kLanes<float>) return load<float>(from);
  Vector<float>::Type v = {};
  std::memcpy(&v, from, count * sizeof(float));
  return v;
}

inline void store_part(float* to, const Vector<float>::Type& v, int64_t count) {
  if (count == kLanes<float>) return store<float>(to, v);
  std::memcpy(to, &v, count * sizeof(float));
}

inline Vector<float>::Type sigmoid(Vector<float>::Type x) { return 1.0f / (1.0f + exponential(-x)); }
inline double sigmoid(double x) { return 1.0 / (1.0 + exponential(-x)); }

void swiglu(int64_t width, const float* hidden, float* activated) {
  over_vectors(width, [&](int64_t j, int64_t count) {
    const auto gate = load_part(hidden + j, count), up = load_part(hidden + width + j, count);
    store_part(activated + j, gate * sigmoid(gate) * up, count);
  });
}

void swiglu(int64_t width, const double* hidden, double* activated) {
  for (int64_t j = 0; j < width; ++j) activated[j] = hidden[j] * sigmoid(hidden[j]) * hidden[width + j];
}

void swiglu_backward(const SwigluRow<float>& row) {
  Vector<float>::Type dots = {};
  over_vectors(row.width, [&](int64_t j, int64_t count) {
    const auto gate = load_part(row.hidden + j, count), up = load_part(row.hidden + row.width + j, count);
    const auto d_activated = load_part(row.d_activated + j, count);
    const auto s = sigmoid(gate), silu = gate * s, activated = silu * up;
    const auto d = d_activated * row.weight;
    dots += d_activated * activated;
    store_part(row.weighted_activated + j, activated * row.weight, count);
    store_part(row.d_hidden + j, d * up * (s + silu * (1.0f - s)), count);
    store_part(row.d_hidden + row.width + j, d * silu, count);
  });
  float sum = 0;
  for (int64_t j = 0; j < kLanes<float>; ++j) sum += dots[j];
  *row.d_weight = sum;
}

void swiglu_backward(const SwigluRow<double>& row) {
  double sum = 0;
  for (int64_t j = 0; j < row.width; ++j) {
    const double gate = row.hidden[j], up = row.hidden[row.width + j];
    const double s = sigmoid(gate), silu = gate * s, d = row.d_activated[j] * row.weight;
    sum += row.d_activated[j] * silu * up;
    row.weighted_activated[j] = silu * up * row.weight;
    row.d_hidden[j] = d * up * (s + silu * (1 - s));
    row.d_hidden[row.width + j] = d * silu;
  }
  *row.d_weight = sum;
}

// ---- Rows ----------------------------------------------------------------------------------------------------------

template <typename T>
void scale(int64_t width, T weight, const T* in, T* out) {
  for (int64_t j = 0; j < width; ++j) out[j] = weight * in[j];
}

template <typename T>
void add_scaled(int64_t width, T weight, const T* in, T* out) {
  for (int64_t j = 0; j < width; ++j) out[j] += weight * in[j];
}

template <typename T>
T scale_and_dot(int64_t width, T weight, const T* in, const T* other, T* out) {
  using V = typename Vector<T>::Type;
  constexpr int64_t W = kLanes<T>;
  V dots[4] = {};
  T sum = 0;
  int64_t j = 0;
  for (; j + 4 * W <= width; j += 4 * W) {
    for (int v = 0; v < 4; ++v) {
      const V x = load<T>(in + j + v * W);
      dots[v] += x * load<T>(other + j + v * W);
      store<T>(out + j + v * W, x * weight);
    }
  }
  for (; j < width; ++j) {
    sum += in[j] * other[j];
    out[j] = in[j] * weight;
  }
  const V all = (dots[0] + dots[1]) + (dots[2] + dots[3]);
  for (int64_t i = 0; i < W; ++i) sum += all[i];
  return sum;
}

template <typename T>
TypedKernels<T> typed() {
  return {product<T>, swiglu, swiglu_backward, scale<T>, add_scaled<T>, scale_and_dot<T>};
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {MOEJAX_ISA_NAME, typed<float>(), typed<double>()};

}  // namespace moejax::MOEJAX_ISA
