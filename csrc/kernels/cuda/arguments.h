#pragma once

#include <cstddef>
#include <cstdint>

#include "core/reduce_op.h"
#include "kernels/cuda/kernels.h"

// What launch.cpp hands to the kernels, and how both cut a run of elements among threads. Whoever
// changes anything here raises kImageAbi.
//
// A run of `count` elements is `groups` groups of 16-byte vectors and the `singles` around them:
//
//   | head |  group 0  |  group 1  |  ...  | tail |
//          ^ both ends are on a 16-byte boundary here
//
// Its tile t takes groups from t * kThreads * (groups a thread takes) on, as many as there are
// threads to take them, and as many singles as it takes elements in groups. So a run with groups
// has its few singles in tile 0, and a run that cannot be vectorised (kNoVectors) is all singles.

namespace pycomm::cuda {

inline constexpr std::uint32_t kVectorBytes = 16;

/// What CUDA guarantees a kernel's parameters since its first version.
inline constexpr std::size_t kMaxArgumentBytes = 4096;

/// In place of a head: no element is at a 16-byte boundary on all sides.
inline constexpr std::uint8_t kNoVectors = 255;

/// Elements of a group: one vector of the narrower side, one or two of the other.
constexpr std::uint32_t group_elements(std::size_t from_bytes, std::size_t to_bytes) {
  return kVectorBytes / static_cast<std::uint32_t>(from_bytes < to_bytes ? from_bytes : to_bytes);
}

/// Groups that a thread of a copy takes, all loaded before the first is stored: what its registers
/// hold. A group has 8 elements where a side is 16 bits wide, 2 of float64, else 4.
constexpr std::uint32_t copy_groups(std::size_t from_bytes, std::size_t to_bytes) {
  return group_elements(from_bytes, to_bytes) == 4 ? 4 : 2;
}

/// A fold has its k sources in flight.
inline constexpr std::uint32_t kFoldGroups = 1;

/// Segments of one launch of a copy: as many as fit.
inline constexpr std::size_t kMaxSegments = 136;

struct CopyArguments {
  const void* from[kMaxSegments];
  void* to[kMaxSegments];
  std::uint64_t count[kMaxSegments];
  std::uint32_t first_tile[kMaxSegments];  // ascending from 0; a tile is a block
  std::uint8_t head[kMaxSegments];
  double scale;  // representable in the accumulator's type
  const float* device_scale;
  float* found_nonfinite;
  std::uint32_t segment_count;
  bool verbatim;  // copy bits
};
static_assert(sizeof(CopyArguments) <= kMaxArgumentBytes);

struct FoldArguments {
  const void* sources[kMaxSources];
  void* destination;
  std::uint64_t count;
  double prescale;  // these three are representable in the accumulator's type
  double divisor;
  double postscale;
  std::uint32_t source_count;
  ReduceOp op;
  std::uint8_t head;
};
static_assert(sizeof(FoldArguments) <= kMaxArgumentBytes);

}  // namespace pycomm::cuda
