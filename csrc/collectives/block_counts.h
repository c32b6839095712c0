#pragma once

#include <cstddef>
#include <cstdint>

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// What the ranks of an all-to-all send to each other, where every block has a length of its own.
///
/// Each rank shows its counts in its staging. The ranks of a host compare all pairs among them; the
/// first rank of each host sends its ranks' counts for the ranks of every other host, in paced
/// rounds, and compares what arrives with what its own ranks expect. Then the hosts spread the
/// first difference by dissemination (as open_operation does), so that all ranks raise one error.
///
/// Cost: two meetings inside a host (three between hosts). Each of H hosts with q ranks also sends
/// (H-1) q messages of 8 q bytes and ceil(log2 H) of 32.
class BlockCounts {
 public:
  BlockCounts(Context& context, const Operation& operation);

  /// Show and compare. The staging is free again once all ranks of the host have met after this.
  /// @throws MismatchError  names two ranks and both numbers.
  Task<> agree();

  /// Valid after agree(), until the host's ranks have met again. In elements.
  std::size_t longest_local() const;
  std::size_t elements_before_mine(int rank) const;

 private:
  /// The first pair, by sender, then receiver, whose counts differ.
  struct Difference {
    std::int64_t sender;
    std::int64_t receiver;
    std::uint64_t sent;
    std::uint64_t expected;
  };
  static constexpr Difference kNone{INT64_MAX, INT64_MAX, 0, 0};

  void show() const;
  /// A local rank's counts by canonical position (host by host): what it sends, or expects.
  const std::uint64_t* sent_by(int peer) const;
  const std::uint64_t* expected_by(int peer) const;
  /// Canonical position of a host's first rank.
  std::size_t first_of(int host) const;
  std::size_t position_of(int rank) const;

  void compare(int sender, int receiver, std::uint64_t sent, std::uint64_t expected);
  Task<> compare_between_hosts();
  Task<> spread();

  Context& context_;
  const Operation& operation_;
  Difference difference_ = kNone;
};

/// Of an all-to-all whose blocks have lengths of their own.
inline bool has_block_counts(const Operation& operation) {
  return operation.kind == Kind::kAllToAll &&
         (!operation.input_counts.empty() || !operation.output_counts.empty());
}

/// The comparison alone, of an all-to-all that is about to happen elsewhere (on GPUs).
/// @throws MismatchError  as above.
Task<> compare_block_counts(Context& context, const Operation& operation);

}  // namespace pycomm
