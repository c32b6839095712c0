#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "collectives/context.h"
#include "core/device_call.h"
#include "core/error.h"
#include "core/operation.h"
#include "core/task.h"
#include "kernels/cuda/kernels.h"
#include "nccl/report.h"

// All that the layers above know of GPUs. docs/adr/0012 says how the calls on them fit in.

namespace pycomm::nccl {

/// The GPUs of a group cannot be connected: every rank raises the same, nothing was sent between
/// them, and the group goes on.
class RefusedError : public InvalidArgumentError {
 public:
  using InvalidArgumentError::InvalidArgumentError;
};

/// A group's calls on its ranks' GPUs. Belongs to the progress thread.
class GpuGroup {
 public:
  /// Waits for what is in flight, each call as long as it may take, then aborts it.
  virtual ~GpuGroup() = default;

  /// Run `operation`, which Plane::issue has prepared, as number `context.sequence` of the group:
  /// open it on the host, wait for its turn on the GPU, launch it. Over once it was launched.
  ///
  /// The group's first call also connects its GPUs.
  /// @throws RefusedError  they cannot be connected.
  virtual Task<> run(Context& context, const Operation& operation) = 0;

  /// Whether the GPU has yet to finish a call, or nobody holds some of the group's memory any more.
  virtual bool in_flight() const = 0;

  /// Look at what is in flight; give back memory that nobody holds, when nothing is.
  /// @throws CommTimeoutError, PeerLostError, CommError  the group is finished: abort().
  virtual void poll() = 0;

  /// Give up what is in flight, here; the GPU drops it. Later calls are the group's to refuse.
  virtual void abort() = 0;
};

/// This process's use of a GPU: that of its first CUDA tensor. Calls from any thread.
class Plane {
 public:
  virtual ~Plane() = default;

  /// Prepare an operation whose tensors lie on a GPU, for GpuGroup::run: set what the ranks have to
  /// agree on, and note which of the work on the caller's stream it comes after. For
  /// kAllocateOnDevice allocate its memory, zeroed on that stream.
  ///
  /// @throws InvalidArgumentError  NCCL cannot do this, or the process uses another GPU.
  /// @throws CommError  no CUDA runtime, no driver or no memory.
  virtual void issue(Operation& operation) = 0;

  /// Copy pieces of the GPU's memory, as Packer does. After `issue`.
  virtual void copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream) = 0;

  /// What is put on `later` from now on waits for what is on `earlier` by now. After `issue`.
  virtual void order(StreamAddress earlier, StreamAddress later) = 0;

  /// The GPU's half of a group; `issue` has returned once.
  /// @param id  the same on all its ranks, and no other group's that shares a rank with it.
  virtual std::unique_ptr<GpuGroup> join(std::uint64_t id) = 0;
};

/// Loads nothing yet.
/// @throws CommError  pycomm was built without the GPU plane.
std::unique_ptr<Plane> make_plane(const Places& places);

}  // namespace pycomm::nccl
