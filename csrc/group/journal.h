#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "core/operation.h"
#include "core/recorder.h"
#include "point_to_point/transfer.h"

namespace pycomm {

/// Writes what one group does into the process's flight recorder. Any thread may.
class Journal {
 public:
  /// Of an operation in the recorder; 0: none.
  using Entry = std::uint64_t;

  /// @param tag    of the group.
  /// @param ranks  of the world, by group rank; all of `world_size` are not listed.
  Journal(Recorder& recorder, int tag, const std::vector<int>& ranks, int world_size);

  Entry queue(const Operation& operation) const;
  /// The operation will be the next one of `context`, at once.
  Entry begin(const Operation& operation, const Context& context) const;
  /// A message has no start of its own.
  Entry queue(const Transfer& transfer) const;

  /// The operation is the current one of `context`, which has just begun it.
  void start(Entry entry, const Context& context) const;

  void end(Entry entry, const Context& context, bool failed) const;
  void end(Entry entry, bool failed) const;

 private:
  Record record_of(const Operation& operation) const;
  Record prepared() const;

  Recorder& recorder_;
  std::vector<int> ranks_;
  std::string name_;
  std::uint64_t key_;
};

}  // namespace pycomm
