#pragma once

#include <atomic>
#include <exception>
#include <functional>
#include <memory>
#include <utility>

#include "core/device_call.h"
#include "core/interrupt_check.h"
#include "group/completions.h"
#include "group/roster.h"
#include "transport/doorbell.h"

namespace pycomm {

/// An operation somebody may wait for. Completed by the progress thread, which rings the process's
/// doorbell; it never calls back.
class Work {
 public:
  /// @param device_call  if the operation is on a GPU.
  explicit Work(Doorbell& doorbell, std::shared_ptr<DeviceCall> device_call = nullptr)
      : doorbell_(doorbell), device_call_(std::move(device_call)) {}

  bool done() const { return done_.load(std::memory_order_acquire); }

  /// Whether the operation is over and its memory free: a GPU has finished with it, too.
  bool settled() const;

  /// Whoever waits for it waits for this group. Called before anybody can.
  void is_call_of(std::shared_ptr<Roster> roster, int group_tag) {
    roster_ = std::move(roster);
    group_tag_ = group_tag;
  }

  /// Block until the operation is over; rethrows what ended it. An interrupted wait leaves the
  /// operation running.
  void wait(const InterruptCheck& check_interrupt);

  /// Note `ticket` in `completions` when the operation is over, at once if it is. Called once.
  void announce_to(std::shared_ptr<Completions> completions, Completions::Ticket ticket);

  /// Somebody begins to wait.
  void await() { awaited_.store(true, std::memory_order_relaxed); }
  bool awaited() const { return awaited_.load(std::memory_order_relaxed); }

  /// Of an operation on a GPU, which ends with its launch; else null.
  const std::shared_ptr<DeviceCall>& device_call() const { return device_call_; }

  /// Seconds from its start to its end; valid once done().
  double seconds() const { return seconds_; }

  /// For the driver: the operation is over, with an error or without.
  void complete(std::exception_ptr error, double seconds);

 private:
  Doorbell& doorbell_;
  const std::shared_ptr<DeviceCall> device_call_;
  std::shared_ptr<Roster> roster_;  // null: of a message
  int group_tag_ = 0;
  std::exception_ptr error_;
  double seconds_ = 0;
  std::atomic<bool> done_{false};
  std::atomic<bool> awaited_{false};

  // Whichever of announce_to() and complete() comes second notes the ticket.
  enum class Watch { kNobody, kWatched, kOver };
  std::atomic<Watch> watch_{Watch::kNobody};
  std::shared_ptr<Completions> completions_;
  Completions::Ticket ticket_ = 0;
};

}  // namespace pycomm
