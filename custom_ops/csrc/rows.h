// Copying, scaling and summing of whole rows. Included once per instruction set, by kernels.cc.
#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "vectors.h"

namespace moejax::MOEJAX_ISA {
namespace {

template <typename T>
void narrow(int64_t width, const Wide<T>* in, T* out) {
  over_vectors<T>(width, [&](int64_t j, int64_t count) { store_part(out + j, load_part(in + j, count), count); });
}

// Writes past the caches, which otherwise read what is about to be written over. `to` is aligned to a vector.
inline void stream(char* to, const Int32s& v) {
#ifndef __x86_64__
  std::memcpy(to, &v, sizeof(v));
#elif MOEJAX_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), same_bits<__m512i>(v));
#elif MOEJAX_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), same_bits<__m256i>(v));
#else
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), same_bits<__m128i>(v));
#endif
}

void copy(int64_t bytes, const char* from, char* to) {
  constexpr int64_t V = MOEJAX_VECTOR_BYTES;
  int64_t j = 0;
  for (; j + V <= bytes; j += V) {
    const Int32s v = load_bits<Int32s>(from + j);
    std::memcpy(to + j, &v, V);
  }
  std::memcpy(to + j, from + j, bytes - j);
}

// As copy; where `to` is not aligned it is copy.
void copy_past_caches(int64_t bytes, const char* from, char* to) {
  constexpr int64_t V = MOEJAX_VECTOR_BYTES;
  if (reinterpret_cast<uintptr_t>(to) % V != 0 || bytes % V != 0) return copy(bytes, from, to);
  for (int64_t j = 0; j < bytes; j += V) stream(to + j, load_bits<Int32s>(from + j));
}

// Makes what was written past the caches visible to other threads, as other writes are when a task ends.
void fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

template <typename T>
void scale(int64_t width, Wide<T> weight, const T* in, T* out) {
  over_vectors<T>(width, [&](int64_t j, int64_t count) {
    store_part(out + j, load_part(in + j, count) * weight, count);
  });
}

// Vectors that are summed side by side, so that the reads of several rows wait for memory together.
constexpr int64_t kAbreast = 4;

template <typename T>
void sum(int64_t width, int64_t count, const T* const* rows, const Wide<T>* weights, T* out) {
  constexpr int64_t L = kLanes<T>;
  const auto weight = [weights](int64_t i) { return weights ? weights[i] : Wide<T>(1); };
  int64_t j = 0;
  for (; j + kAbreast * L <= width; j += kAbreast * L) {
    Vector<T> sums[kAbreast] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < kAbreast; ++v) sums[v] += load(rows[i] + j + v * L) * weight(i);
    }
    for (int64_t v = 0; v < kAbreast; ++v) store(out + j + v * L, sums[v]);
  }
  over_vectors<T>(width - j, [&](int64_t first, int64_t lanes) {
    Vector<T> total = {};
    for (int64_t i = 0; i < count; ++i) total += load_part(rows[i] + j + first, lanes) * weight(i);
    store_part(out + j + first, total, lanes);
  });
}

template <typename T>
Wide<T> scale_and_dot(int64_t width, Wide<T> weight, const T* in, const T* other, T* out) {
  constexpr int64_t L = kLanes<T>;
  Vector<T> dots[kAbreast] = {};
  int64_t j = 0;
  for (; j + kAbreast * L <= width; j += kAbreast * L) {
    for (int64_t v = 0; v < kAbreast; ++v) {
      const Vector<T> x = load(in + j + v * L);
      dots[v] += x * load(other + j + v * L);
      store(out + j + v * L, x * weight);
    }
  }
  over_vectors<T>(width - j, [&](int64_t first, int64_t lanes) {
    const Vector<T> x = load_part(in + j + first, lanes);
    dots[0] += x * load_part(other + j + first, lanes);
    store_part(out + j + first, x * weight, lanes);
  });
  const Vector<T> all = (dots[0] + dots[1]) + (dots[2] + dots[3]);
  Wide<T> total = 0;
  for (int64_t i = 0; i < L; ++i) total += all[i];
  return total;
}

}  // namespace
}  // namespace moejax::MOEJAX_ISA
