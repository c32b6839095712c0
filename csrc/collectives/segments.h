#pragma once

#include <algorithm>
#include <cstddef>

#include "collectives/partition.h"

namespace pycomm {

/// A message between hosts is at most this long: below what Open MPI over TCP sends at once (64
/// KiB), so that no message waits for its receiver's word before it leaves.
constexpr std::size_t kSegmentBytes = 60 << 10;

/// Segments of each chunk of a share: the longest chunk's decides, so that all hosts send and
/// receive equally many messages. At least one, which may be empty.
constexpr std::size_t segments_of(std::size_t share_count, int chunks, std::size_t element_bytes) {
  const auto c = static_cast<std::size_t>(chunks);
  const std::size_t bytes = (share_count + c - 1) / c * element_bytes;
  return std::max<std::size_t>(1, (bytes + kSegmentBytes - 1) / kSegmentBytes);
}

/// Segment `index` of a chunk.
constexpr Range segment(const Range& chunk, std::size_t segments, std::size_t index) {
  const Range range = partition(chunk.count(), static_cast<int>(segments), static_cast<int>(index));
  return {chunk.begin + range.begin, chunk.begin + range.end};
}

}  // namespace pycomm
