// What the CUDA handlers share: launch errors, and how threads are laid out over rows.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "checks.h"

namespace moejax {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;

// Nothing here waits for the GPU: what is reported is whether the launches were accepted.
inline ffi::Error launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("moejax: CUDA refused a launch: ") + cudaGetErrorString(error));
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace moejax
