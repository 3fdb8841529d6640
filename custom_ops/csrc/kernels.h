// The inner loops that are compiled once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace moejax {

// 16-bit floating-point numbers as they lie in memory; what is computed with them is f32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What products and sums of T are formed in.
template <typename T>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

// C[rows, cols] = A[rows, depth] * B[depth, cols], with element strides; of A and of B one stride must be 1.
// C is contiguous along its columns. Every element is summed in order of depth, whatever the block it lies in.
template <typename T>
struct Product {
  int64_t rows, cols, depth;
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth, b_col;
  Wide<T>* c;
  int64_t c_row;
};

// One row of SwiGLU's backward pass; see custom_ops/swiglu.py.
template <typename T>
struct SwigluRow {
  int64_t width;           // F
  const T* hidden;         // gate [F], then up [F]
  const T* d_activated;    // [F], before weighting
  T weight;
  T* weighted_activated;   // [F]
  T* d_hidden;             // [2F]
  T* d_weight;             // one number
};

template <typename T>
struct RowKernels {
  void (*product)(const Product<T>&);
  // out = in, rounded to T.
  void (*narrow)(int64_t width, const Wide<T>* in, T* out);
  // out = weight * in.
  void (*scale)(int64_t width, Wide<T> weight, const T* in, T* out);
  // out = sum of weights[i] * rows[i], in order of i; 0 for none. Without weights (null) they are 1.
  void (*sum)(int64_t width, int64_t count, const T* const* rows, const Wide<T>* weights, T* out);
  // out = weight * in; returns the inner product of `in` and `other`.
  Wide<T> (*scale_and_dot)(int64_t width, Wide<T> weight, const T* in, const T* other, T* out);
};

template <typename T>
struct SwigluKernels {
  void (*forward)(int64_t width, const T* hidden, T* activated);
  void (*backward)(const SwigluRow<T>&);
};

struct CopyKernels {
  void (*copy)(int64_t bytes, const char* from, char* to);
  // Of rows that no cache would hold until they are read; to be followed by a fence, in the same thread.
  void (*copy_past_caches)(int64_t bytes, const char* from, char* to);
  void (*fence)();
};

struct Kernels {
  const char* instruction_set;
  CopyKernels bytes;
  RowKernels<float> f32;
  RowKernels<double> f64;
  RowKernels<bf16> bf16_rows;
  RowKernels<f16> f16_rows;
  SwigluKernels<float> swiglu_f32;
  SwigluKernels<double> swiglu_f64;

  template <typename T>
  const RowKernels<T>& of() const;
  template <typename T>
  const SwigluKernels<T>& swiglu() const;
};

template <>
inline const RowKernels<float>& Kernels::of<float>() const { return f32; }
template <>
inline const RowKernels<double>& Kernels::of<double>() const { return f64; }
template <>
inline const RowKernels<bf16>& Kernels::of<bf16>() const { return bf16_rows; }
template <>
inline const RowKernels<f16>& Kernels::of<f16>() const { return f16_rows; }
template <>
inline const SwigluKernels<float>& Kernels::swiglu<float>() const { return swiglu_f32; }
template <>
inline const SwigluKernels<double>& Kernels::swiglu<double>() const { return swiglu_f64; }

// The fastest ones that this machine can run.
const Kernels& kernels();

}  // namespace moejax
