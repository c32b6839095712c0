#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "core/record.h"

namespace pycomm {

/// The flight recorder of a process: its last operations, in shared memory, so that others can read
/// them when it hangs or is gone.
///
/// Any thread of the process writes. A record is published by its number, which is 0 while the rest
/// of it is written; a reader that finds another number after reading than before has read nothing
/// (a seqlock for each record). All words are atomic, with relaxed order but for the number.
///
/// Cost of an operation from its beginning to its end: about 0.1 us, two readings of the clock
/// among it.
class Recorder {
 public:
  static constexpr std::size_t kRecords = 1024;

  /// Leaves the memory as it is: it is fresh, of zeros, and most of it may never be touched.
  Recorder() {}  // NOLINT(modernize-use-equals-default): that would write zeros

  /// Note a new operation, whose number replaces that of `record`.
  /// @return  its number.
  std::uint64_t begin(Record record);

  /// The operation has been started as number `sequence` of its group, which has been told of it
  /// under this hash (0: not yet).
  void start(std::uint64_t number, std::int64_t now_ns, std::uint64_t sequence, std::uint64_t hash);

  /// It has ended; the rest as for start().
  void end(std::uint64_t number, std::int64_t now_ns, bool failed, std::uint64_t sequence,
           std::uint64_t hash);

  /// The number of the latest operation; 0: none yet.
  std::uint64_t latest() const { return latest_.load(std::memory_order_acquire); }

  /// Nothing if it has been replaced by a later one, or is being written.
  std::optional<Record> read(std::uint64_t number) const;

  /// The first of those still held that has not ended. Reads all of them.
  std::optional<Record> first_unfinished() const;

 private:
  static constexpr std::size_t kWords = sizeof(Record) / sizeof(std::uint64_t);
  static_assert(kWords * sizeof(std::uint64_t) == sizeof(Record));
  using Words = std::array<std::uint64_t, kWords>;

  /// The word at a byte of the record with this number, to be changed; null if it was replaced.
  std::uint64_t* word(std::uint64_t number, std::size_t offset);

  std::atomic<std::uint64_t> latest_{0};
  std::array<Words, kRecords> slots_;
};

}  // namespace pycomm
