// What every handler checks of its buffers: a wrong call is an error of the program, never a crash of the process.
#pragma once

#include <algorithm>
#include <exception>
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

// Of types with fewer than 8 bits XLA packs several numbers into a byte: a row of them has no whole number of bytes.
inline bool is_whole_bytes(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::S1:
    case ffi::S2:
    case ffi::S4:
    case ffi::U1:
    case ffi::U2:
    case ffi::U4:
    case ffi::F4E2M1FN: return false;
    default: return true;
  }
}

// Rows and choices are counted in int32, in every table.
constexpr int64_t kMaxRows = int64_t{1} << 31;

// Guarded<handler>::call is the handler with its exceptions (an allocation that failed) turned into errors: XLA calls it
// through C, which none may cross.
template <auto handler>
struct Guarded;
template <typename... Arguments, ffi::Error (*handler)(Arguments...)>
struct Guarded<handler> {
  static ffi::Error call(Arguments... arguments) {
    try {
      return handler(arguments...);
    } catch (const std::exception& exception) {
      return ffi::Error::Internal(std::string("moejax: ") + exception.what());
    }
  }
};

}  // namespace moejax
