#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "core/dtype.h"
#include "core/reduce_op.h"
#include "group/group.h"
#include "transport/arena.h"

namespace pycomm {

/// What the cores and caches of one host need for the loads and stores of an all-reduce alone: the
/// yardstick of the benchmarks. Nothing here waits for a peer except round_trip(), so what comes
/// out of the folds is used for its duration only.
class MachineLimit {
 public:
  /// Collective: every rank shows its buffer to the others.
  /// @throws InvalidArgumentError  the group spans several hosts.
  MachineLimit(Group& group, std::shared_ptr<ArenaBlock> buffer);

  /// Seconds this rank needs to fold its part of everybody's first `count` elements, in rank order,
  /// and to store the result in all of their buffers.
  double fold_part(std::size_t count, DType dtype) const;

  /// Seconds this rank needs to copy its first `count` elements to where its peers read them.
  double show(std::size_t count, DType dtype) const;

  /// Seconds this rank needs to fold what all ranks have shown. With show() this is what every rank
  /// of a small all-reduce does.
  double fold_shown(std::size_t count, DType dtype);

  /// Seconds for a cache line to go from rank 0 to rank 1 and back, the mean of `trips`; 0 on the
  /// other ranks, and in a group of one.
  double round_trip(int trips);

 private:
  struct Line;

  std::byte* buffer_of(int rank) const;
  Line& line_of(int rank) const;

  const int rank_;
  const std::shared_ptr<ArenaBlock> buffer_;
  const std::shared_ptr<ArenaBlock> page_;  // the line, and behind it what show() copies
  std::vector<std::byte*> buffers_;
  std::vector<std::byte*> pages_;
  std::vector<std::byte> folded_;
};

/// Seconds for one in-place all-reduce of each of `buffers`, one after the other, issued from C++:
/// what a call costs without Python.
double time_all_reduces(Group& group, const std::vector<std::byte*>& buffers, std::size_t count,
                        DType dtype);

}  // namespace pycomm
