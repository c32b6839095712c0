#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "core/operation.h"

namespace pycomm {

/// Where the ranks' blocks lie in a buffer, end to end in rank order, in bytes.
class Layout {
 public:
  /// @param counts  elements of each rank's block; empty: `count` each.
  Layout(const std::vector<std::size_t>& counts, std::size_t count, std::size_t element, int ranks)
      : begins_(static_cast<std::size_t>(ranks) + 1) {
    for (std::size_t rank = 0; rank < size(); ++rank) {
      const std::size_t bytes = (counts.empty() ? count : counts[rank]) * element;
      begins_[rank + 1] = begins_[rank] + bytes;
      longest_ = std::max(longest_, bytes);
    }
  }
  static Layout of_input(const Operation& operation, int ranks) {
    return {operation.input_counts, operation.count, size_of(operation.dtype), ranks};
  }
  static Layout of_output(const Operation& operation, int ranks) {
    return {operation.output_counts, operation.count, size_of(operation.dtype), ranks};
  }

  std::size_t size() const { return begins_.size() - 1; }
  std::size_t begin(std::size_t rank) const { return begins_[rank]; }
  std::size_t bytes(std::size_t rank) const { return begins_[rank + 1] - begins_[rank]; }
  std::size_t longest() const { return longest_; }
  std::size_t total() const { return begins_.back(); }

 private:
  std::vector<std::size_t> begins_;
  std::size_t longest_ = 0;
};

}  // namespace pycomm
