#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace pycomm {

/// The upper 16 bits of the largest absolute value among some floats. They hold the whole exponent
/// of float16, bfloat16, float32 and float64, and as numbers they are ordered as the values are:
/// finite ones, then infinity, then NaN.
using Magnitude = std::uint16_t;

/// Whether some floats can be summed. The numbers travel between ranks, and a larger one stands for
/// all smaller ones.
enum class Extent : std::uint8_t {
  /// They are finite, and so is the sum of as many such numbers as there are ranks.
  kSummable = 0,
  /// They are finite, but their sum may overflow.
  kLarge = 1,
  /// One is NaN or infinite.
  kNonFinite = 2,
};

/// Of `bytes` bytes of whole elements: complex numbers as their components.
///
/// Cost: one read, about as fast as memory allows.
/// @throws InvalidArgumentError  `dtype` is none of the four above.
Magnitude largest_magnitude(DType dtype, const std::byte* from, std::size_t bytes);

/// The same, while they are copied to `to`, which is aligned to their size: nothing is read twice.
/// `past_caches` as for copy_past_caches().
///
/// Cost: that of the copy.
Magnitude copy_measured(DType dtype, std::byte* to, const std::byte* from, std::size_t bytes,
                        bool past_caches);

/// What the largest magnitude on this rank says, where `summands` ranks bring numbers that are all
/// divided by one or more at last. In float32 accumulators or in `dtype` itself, in any order.
Extent extent_of(Magnitude magnitude, DType dtype, std::size_t summands);

}  // namespace pycomm
