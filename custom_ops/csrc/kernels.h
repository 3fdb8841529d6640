// The inner loops that are compiled once per instruction set, and the choice among them.
#pragma once

#include <cstdint>

namespace moejax {

// C[rows, cols] = A[rows, depth] * B[depth, cols], with element strides; of A and of B one stride must be 1.
// C is contiguous along its columns. Every element is summed in order of depth, whatever the block it lies in.
template <typename T>
struct Product {
  int64_t rows, cols, depth;
  const T* a;
  int64_t a_row, a_depth;
  const T* b;
  int64_t b_depth, b_col;
  T* c;
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
struct TypedKernels {
  void (*product)(const Product<T>&);
  void (*swiglu)(int64_t width, const T* hidden, T* activated);
  void (*swiglu_backward)(const SwigluRow<T>&);
  // out = weight * in, and out += weight * in.
  void (*scale)(int64_t width, T weight, const T* in, T* out);
  void (*add_scaled)(int64_t width, T weight, const T* in, T* out);
  // out = weight * in; returns the inner product of `in` and `other`.
  T (*scale_and_dot)(int64_t width, T weight, const T* in, const T* other, T* out);
};

struct Kernels {
  const char* instruction_set;
  TypedKernels<float> f32;
  TypedKernels<double> f64;

  template <typename T>
  const TypedKernels<T>& of() const;
};

template <>
inline const TypedKernels<float>& Kernels::of<float>() const { return f32; }
template <>
inline const TypedKernels<double>& Kernels::of<double>() const { return f64; }

// The fastest ones that this machine can run.
const Kernels& kernels();

}  // namespace moejax
