#pragma once

#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include "core/operation.h"
#include "group/execution.h"
#include "group/journal.h"
#include "group/work.h"

namespace pycomm {

class Group;

/// A thread's turn on a group inside one host: it runs operations itself, as far as they go without
/// waiting, whenever it comes by, and waits only at the end. Nobody is woken, no thread competes
/// for the core that computes, and each rank's share of the work is done on that rank's core. (With
/// the progress thread the kernel places that share, often on the core of another rank.)
///
/// Other threads' operations on the group wait until the turn ends. Used by one thread at a time.
class Turn {
 public:
  /// Null if the group is not idle, has failed or spans several hosts: somebody has to look at a
  /// network all the time. Group::start() then says why, or does it.
  static std::unique_ptr<Turn> take(std::shared_ptr<Group> group);
  /// Operations that have not ended are dropped, so the group must have been finished before.
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  /// Issue an operation, on host memory, behind those issued before, and advance().
  /// @throws InvalidArgumentError  nothing was issued.
  void start(Operation operation);

  /// Whether all that was started is over.
  bool done() const { return operations_.empty(); }

  /// Go on as far as possible without waiting. An error finishes the group and is kept for wait().
  void advance();

  /// Look at deadlines and peers, for a thread that does not wait. What ends an operation finishes
  /// the group and is kept for wait().
  void check();

  /// Block until all is over; rethrows what ended it. An interrupt finishes the group.
  void wait(const InterruptCheck& check_interrupt);

 private:
  explicit Turn(std::shared_ptr<Group> group) : group_(std::move(group)) {}

  /// True if anything has changed.
  bool step();
  /// Whether the current operation can still end.
  void look();
  /// What is left will not be run, because of the exception being handled.
  void fail();

  const std::shared_ptr<Group> group_;
  struct Issued {
    Operation operation;
    Journal::Entry entry;
  };
  std::deque<Issued> operations_;       // the first is, or will be, the current one
  std::optional<Execution> execution_;  // of operations_.front()
  std::exception_ptr error_;
};

}  // namespace pycomm
