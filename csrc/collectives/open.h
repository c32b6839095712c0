#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Show the ranks of this host the group's next operation: the first half of opening it. Does not
/// wait, and is undone by nothing: the operation has to follow.
void announce(Context& context, const Operation& operation, std::uint64_t buffer_offset,
              std::span<const std::byte> payload);

/// Start an operation together: announce it, wait until every rank of the group has, and compare.
/// Nothing has been written when this throws.
///
/// Inside a host every rank compares with every other; the announcement carries a small payload
/// and where the buffer lies, so a small operation needs no further step. Between hosts each host's
/// first rank gathers its ranks' signatures, and the hosts spread the two extreme hashes by
/// dissemination (Hensgen, Finkel & Manber, Int. J. Parallel Program. 17 (1988)): after
/// ceil(log2 H) rounds all of them know whether all signatures are equal, and if not, two ranks
/// that differ. So every rank raises an error, whoever it would have exchanged data with.
///
/// Cost: one arrival inside a host; between H hosts ceil(log2 H) alpha more.
///
/// An operation that announce() has already shown is not announced again.
///
/// @param payload  at most Announcement::kEagerBytes, for the ranks of this host; one that fits the
///                 announcement's line takes the place of `buffer_offset`.
/// @throws MismatchError, and what has finished the group before.
Task<> open_operation(Context& context, const Operation& operation, std::uint64_t buffer_offset,
                      std::span<const std::byte> payload);

/// What every host adds to the messages by which the hosts agree, so that all have all of them.
struct HostSum {
  std::size_t bytes;
  /// Writes this host's. Called on its first rank once the host's ranks agree among themselves.
  std::function<void(std::byte*)> write;
};

/// open_operation between hosts, on whose messages every host's sum rides: round k passes on the
/// sums of 2^k hosts, or as many as are still missing, beside the extremes. Not a message more.
///
/// @return  all hosts' sums end to end, from this host's backwards (host h, h-1, ...). They lie in
///          the staging of the host's first rank until the next operation.
Task<const std::byte*> open_with_sums(Context& context, const Operation& operation,
                                      std::span<const std::byte> payload, HostSum sum);

/// open_operation, in which the ranks also agree on the largest of their numbers. On several hosts
/// these ride on the same messages.
Task<std::uint64_t> open_with_largest(Context& context, const Operation& operation,
                                      std::uint64_t number);

/// The length of the hosts' longest message in open_with_sums; it must fit half the staging.
std::size_t agreement_bytes(int host_count, std::size_t sum_bytes);

/// Wait until every rank of this host is here.
Task<> meet(Context& context);

}  // namespace pycomm
