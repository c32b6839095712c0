#pragma once

#include <compare>
#include <cstdint>
#include <map>

namespace pycomm::nccl {

/// In which order a rank launches the calls of all its groups on its GPU: one that no two ranks see
/// differently. NCCL needs that: a kernel occupies the GPU until every rank's part runs, so two
/// ranks that launch the calls of two communicators in opposite orders may wait for each other for
/// ever.
///
/// It is Skeen's total order (Birman & Joseph, ACM Trans. Comput. Syst. 5 (1987)), whose one round
/// rides on the agreement that opens a collective anyway. Every rank proposes a time, later than
/// all it knows; the call's time is the latest proposal, which after the agreement all its ranks
/// know; and a call is launched once no other one here can come before it:
///
///   rank 0   A proposes 1 .............. A is 3       | launches B (2), A (3)
///   rank 1   B proposes 1, A 2 ... B is 2, A is 3     | launches B (2), A (3)
///   rank 2   B proposes 2, A 3 ... A is 3 ... B is 2  | A waits for B, which might be 2: B, A
///
/// Nobody coordinates, no rank outside a group hears of its calls, and groups may overlap in any
/// way. A call waits here for calls of other groups that this rank has proposed a time for, never
/// for later ones. So where the collectives of the groups do not deadlock in the order in which
/// they are issued, neither does this.
///
/// Messages have no such order: two that cross, each issued before its sender's next collective,
/// are matched when both ranks have issued them, which may be after that collective has begun. If
/// it proposed its time at once, the message would wait for ranks that are still to begin it, and
/// these may be waiting for a message that is held up likewise:
///
///   rank 0   reads what m brought, begins A     rank 1   sends m, begins B: m waits for B
///   rank 3   reads what n brought, begins B     rank 2   sends n, begins A: n waits for A
///
/// So a rank that has messages proposes a time for a collective only once all ranks have begun it,
/// in a round of its own: from then on nobody's caller is needed any more.
///
/// Pure: no clock, no communication. One for each GPU of a process, used by its progress thread.
class LaunchOrder {
 public:
  /// When a call is launched. Times are equal only for calls of different groups.
  struct Time {
    std::uint64_t tick = 0;
    std::uint64_t group =
        0;  // the same on all its ranks, and no other's that shares a rank with it
    auto operator<=>(const Time&) const = default;
  };

  /// A call on its way to the GPU. A group has one at a time: the next begins when it was launched.
  ///
  /// @return  the tick to propose.
  std::uint64_t propose(std::uint64_t group);

  /// The agreement is over: `tick` is the latest of all ranks' proposals.
  void agree(std::uint64_t group, std::uint64_t tick);

  /// Whether it is the turn of the group's call.
  bool is_next(std::uint64_t group) const;

  /// The call was launched, or given up: others need not wait for it.
  void leave(std::uint64_t group);

 private:
  struct Call {
    std::uint64_t tick;
    bool agreed;
  };
  std::uint64_t latest_ = 0;             // tick that this rank knows
  std::map<std::uint64_t, Call> calls_;  // by group
};

}  // namespace pycomm::nccl
