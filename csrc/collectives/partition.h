#pragma once

#include <algorithm>
#include <cstddef>

namespace pycomm {

/// Elements [begin, end) of a buffer.
struct Range {
  std::size_t begin;
  std::size_t end;
  constexpr std::size_t count() const { return end - begin; }
};

/// Chunk `index` of `count` elements cut into `parts`: the chunks tile the buffer in order and
/// differ by less than two granules. A granule is `granule` elements (a cache line's worth, so that
/// two ranks never write one line); the last one may be short.
constexpr Range partition(std::size_t count, int parts, int index, std::size_t granule = 1) {
  const std::size_t granules = (count + granule - 1) / granule;
  const auto boundary = [&](int i) {
    const auto p = static_cast<std::size_t>(parts);
    const auto at = static_cast<std::size_t>(i);
    // the first (granules mod p) chunks are one granule longer
    return std::min(count, (granules / p * at + std::min(at, granules % p)) * granule);
  };
  return {boundary(index), boundary(index + 1)};
}

}  // namespace pycomm
