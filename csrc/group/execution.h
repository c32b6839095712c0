#pragma once

#include <chrono>
#include <optional>
#include <string>

#include "collectives/context.h"
#include "core/clock.h"
#include "core/operation.h"
#include "core/task.h"
#include "nccl/plane.h"

namespace pycomm {

/// Throws what a peer, or the job, has posted, or that a local peer is gone.
/// @param call  what waits for it, for the error.
void check_peers(const Window& window, const std::string& call);

/// One operation on its way, driven from outside by whichever thread has it.
class Execution {
 public:
  /// Starts the operation, as the group's next one, and its clock. All arguments outlive this.
  /// @param gpus  the group's, for an operation on them.
  Execution(Context& context, const Operation& operation, nccl::GpuGroup* gpus = nullptr);
  Execution(const Execution&) = delete;
  Execution& operator=(const Execution&) = delete;

  bool done() const { return task_.done(); }

  /// Go on as far as possible. False if the operation still waits for what it waited for before.
  bool advance();

  /// The operation is done: throws what ended it, if it was an error.
  void finish() { task_.take(); }

  /// @throws CommTimeoutError, PeerLostError, MismatchError, or what a peer has posted.
  void check();

  bool rings_doorbell() const { return suspension_.wait->rings_doorbell(); }
  double seconds() const { return std::chrono::duration<double>(Clock::now() - began_).count(); }

  std::string describe() const { return describe_call(context_, operation_); }

 private:
  /// A local rank that has called shutdown() will not come any more.
  void check_for_leavers();
  /// If this is the first waiting rank of its host: one line on stderr says who is waited for.
  void warn() const;
  /// Throws, unless another rank of the host is about to, for all.
  void time_out() const;

  Context& context_;
  const Operation& operation_;
  const Clock::time_point began_ = Clock::now();
  bool warned_ = false;
  std::optional<Clock::time_point> left_since_;  // a rank that has not announced this operation
  Suspension suspension_;
  Task<> task_;
};

}  // namespace pycomm
