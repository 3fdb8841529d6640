// SwiGLU of one row and its backward pass. Included once per instruction set, by kernels.cc.
#pragma once

#include <cmath>

#include "vectors.h"

namespace moejax::MOEJAX_ISA {
namespace {

inline double exponential(double x) { return std::exp(x); }

// exp(x) = 2^n * exp(r) with |r| <= ln(2) / 2 and a Taylor polynomial of degree 7 (error below 6e-9); about 1 ulp.
inline Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
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

inline Vector<float> sigmoid(Vector<float> x) { return 1.0f / (1.0f + exponential(-x)); }
inline double sigmoid(double x) { return 1.0 / (1.0 + exponential(-x)); }

void swiglu(int64_t width, const float* hidden, float* activated) {
  over_vectors<float>(width, [&](int64_t j, int64_t count) {
    const auto gate = load_part(hidden + j, count), up = load_part(hidden + width + j, count);
    store_part(activated + j, gate * sigmoid(gate) * up, count);
  });
}

void swiglu(int64_t width, const double* hidden, double* activated) {
  for (int64_t j = 0; j < width; ++j) activated[j] = hidden[j] * sigmoid(hidden[j]) * hidden[width + j];
}

void swiglu_backward(const SwigluRow<float>& row) {
  Vector<float> dots = {};
  over_vectors<float>(row.width, [&](int64_t j, int64_t count) {
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

}  // namespace
}  // namespace moejax::MOEJAX_ISA
