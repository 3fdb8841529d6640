// What every handler checks of its buffers: a wrong call is an error of the program, never a crash of the process.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace moejax {

namespace ffi = xla::ffi;

#define MOEJAX_REQUIRE(condition, message)                                            \
  do {                                                                                \
    if (!(condition)) return ffi::Error::InvalidArgument(std::string("moejax: ") + (message)); \
  } while (0)

template <typename Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  return dimensions.size() == shape.size() && std::equal(shape.begin(), shape.end(), dimensions.begin());
}

}  // namespace moejax
