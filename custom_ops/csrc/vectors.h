// Vectors of the width that is being compiled for, and how every type is read into them and written from them.
//
// They are the compiler's own (GCC, Clang), so one text serves SSE2, AVX2, AVX-512 and NEON. Included once per
// instruction set, by kernels.cc: MOEJAX_ISA is its namespace, MOEJAX_VECTOR_BYTES the width.
#pragma once

#include <cstring>

#include "kernels.h"

namespace moejax::MOEJAX_ISA {
namespace {

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Type __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double Type __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
};
// The vector that holds as many numbers of T as are computed with at once.
template <typename T>
using Vector = typename VectorOf<Wide<T>>::Type;
typedef int32_t Int32s __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
typedef uint32_t UInt32s __attribute__((vector_size(MOEJAX_VECTOR_BYTES)));
typedef uint16_t UInt16s __attribute__((vector_size(MOEJAX_VECTOR_BYTES / 2)));

template <typename T>
constexpr int64_t kLanes = MOEJAX_VECTOR_BYTES / sizeof(Wide<T>);

template <typename To, typename From>
inline To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename V, typename T>
inline V load_bits(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

// ---- One vector of each type -----------------------------------------------------------------------------------------

inline Vector<float> load(const float* from) { return load_bits<Vector<float>>(from); }
inline Vector<double> load(const double* from) { return load_bits<Vector<double>>(from); }
inline Vector<float> load(const bf16* from) {
  return same_bits<Vector<float>>(__builtin_convertvector(load_bits<UInt16s>(from), UInt32s) << 16);
}
inline Vector<float> load(const f16* from) {
  const UInt32s half = __builtin_convertvector(load_bits<UInt16s>(from), UInt32s);
  const UInt32s exponent = half & 0x7c00u, sign = (half & 0x8000u) << 16;
  UInt32s bits = ((half & 0x7fffu) << 13) + (112u << 23);
  // Of infinity and NaN the exponent is the largest here too. A subnormal number is formed by a subtraction that stays
  // among normal ones, since XLA lets its threads flush the others to 0.
  bits = exponent == 0x7c00u ? bits + (112u << 23) : bits;
  const Vector<float> subnormal = same_bits<Vector<float>>(bits + (1u << 23)) - 0x1p-14f;
  bits = exponent == 0u ? same_bits<UInt32s>(subnormal) : bits;
  return same_bits<Vector<float>>(bits | sign);
}

inline void store(float* to, const Vector<float>& v) { std::memcpy(to, &v, sizeof(v)); }
inline void store(double* to, const Vector<double>& v) { std::memcpy(to, &v, sizeof(v)); }
inline void store_low_halves(void* to, const UInt32s& v) {
  const UInt16s halves = __builtin_convertvector(v, UInt16s);
  std::memcpy(to, &halves, sizeof(halves));
}
// Both round to nearest, ties to even.
inline void store(bf16* to, const Vector<float>& v) {
  const UInt32s bits = same_bits<UInt32s>(v);
  const UInt32s rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding could carry a NaN into an infinity; a quiet one keeps what still fits.
  store_low_halves(to, (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
inline void store(f16* to, const Vector<float>& v) {
  const UInt32s sign = same_bits<UInt32s>(v) & 0x80000000u, bits = same_bits<UInt32s>(v) ^ sign;
  const UInt32s normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal number's digits, rounded, in the lowest bits.
  const UInt32s subnormal = same_bits<UInt32s>(same_bits<Vector<float>>(bits) + 0.5f) - (126u << 23);
  UInt32s half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? UInt32s{} + 0x7c00u : half;  // 65536 and above; what rounds up to it got there itself
  half = bits > (255u << 23) ? UInt32s{} + 0x7e00u : half;
  store_low_halves(to, half | (sign >> 16));
}

// ---- Whole rows ------------------------------------------------------------------------------------------------------

// The first `count` numbers of a vector; the others are 0, or not written.
template <typename T>
inline Vector<T> load_part(const T* from, int64_t count) {
  if (count == kLanes<T>) return load(from);
  T whole[kLanes<T>] = {};
  std::memcpy(whole, from, count * sizeof(T));
  return load(whole);
}
template <typename T>
inline void store_part(T* to, const Vector<T>& v, int64_t count) {
  if (count == kLanes<T>) return store(to, v);
  T whole[kLanes<T>];
  store(whole, v);
  std::memcpy(to, whole, count * sizeof(T));
}

// Calls f(first, how many) for whole vectors of T as long as they fit, and for what is left in the end.
template <typename T, typename F>
inline void over_vectors(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + kLanes<T> <= width; j += kLanes<T>) f(j, kLanes<T>);
  if (j < width) f(j, width - j);
}

}  // namespace
}  // namespace moejax::MOEJAX_ISA
