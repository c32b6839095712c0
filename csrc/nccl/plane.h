#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "core/device_call.h"
#include "core/error.h"
#include "core/operation.h"
#include "core/task.h"
#include "kernels/cuda/kernels.h"
#include "nccl/report.h"
#include "transport/arena.h"

// All that the layers above know of GPUs. docs/adr/0012 says how the calls on them fit in.

namespace pycomm::nccl {

/// The GPUs of a group cannot be connected, or NCCL cannot do what it is asked for: every rank
/// raises the same, nothing was sent between them, and the group goes on.
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
  /// @throws RefusedError  they cannot be connected, or what carries the calls cannot do this one.
  virtual Task<> run(Context& context, const Operation& operation) = 0;

  /// Whether the GPU has yet to finish a call, or nobody holds some of the group's memory any more.
  virtual bool in_flight() const = 0;

  /// For errors: the oldest call in flight; "" if there is only memory to give back.
  virtual std::string describe() const = 0;

  /// Look at what is in flight; give back memory that nobody holds, when nothing is.
  /// @throws CommTimeoutError, PeerLostError, CommError  the group is finished: abort().
  virtual void poll() = 0;

  /// Give up what is in flight, here; the GPU drops it. Later calls are the group's to refuse.
  virtual void abort() = 0;
};

/// Half of a message between GPUs, as this rank has it.
struct GpuMessage {
  bool sends;
  std::byte* memory;
  std::size_t bytes;
  std::shared_ptr<DeviceCall> call;  // Plane::record
  std::string description;           // for errors
  std::chrono::steady_clock::time_point began;
  double timeout_s;
};

/// The messages between this rank's GPU and another one's. Both ranks launch them in batches: the
/// same halves in the same order, each batch one NCCL group, so that messages in both directions do
/// not wait for each other. A batch is to the launch order what a collective of a group of two
/// would be. Belongs to the progress thread.
class GpuPair {
 public:
  /// Waits for what is in flight, each message as long as it may take, then aborts it.
  virtual ~GpuPair() = default;

  /// Begin with the next batch: what this rank has to tell the other one before it, which is its
  /// proposal for the launch order and, until they are connected, its card. launch() has to follow.
  virtual std::vector<std::byte> propose() = 0;

  /// Launch a batch, which both ranks know by now. Over once it was launched. The pair's first
  /// batch also connects the GPUs.
  /// @param theirs  what the other rank has proposed.
  /// @throws RefusedError  the GPUs cannot be connected, which both ranks find.
  virtual Task<> launch(std::vector<GpuMessage> batch, std::vector<std::byte> theirs) = 0;

  /// As those of GpuGroup.
  virtual bool in_flight() const = 0;
  virtual std::string describe() const = 0;
  virtual void poll() = 0;
  virtual void abort() = 0;
};

/// What moves bytes between the memory of two ranks' hosts: those of a pair without NCCL. Each way
/// in order. Belongs to the progress thread.
class HostMail {
 public:
  virtual ~HostMail() = default;

  /// Begin; the result is over once the bytes have left their memory, or come. They stay there, and
  /// as long as the other rank has them, until then.
  virtual std::shared_ptr<Wait> send(std::span<const std::byte> bytes) = 0;
  virtual std::shared_ptr<Wait> receive(std::span<std::byte> bytes) = 0;
};

/// Which two ranks of which group, and what they have between their hosts.
struct Pairing {
  std::uint64_t id;  // as a group's
  int rank;          // this one
  int peer;          // may be this one as well
  bool same_host;
  HostMail& mail;          // outlives the pair
  Arena& arena;            // this rank's
  std::size_t slot_bytes;  // the same at both ends
};

/// This process's use of a GPU: that of its first CUDA tensor. Calls from any thread.
class Plane {
 public:
  virtual ~Plane() = default;

  /// Prepare an operation whose tensors lie on a GPU, for GpuGroup::run: set what the ranks have to
  /// agree on, and note which of the work on the caller's stream it comes after. For
  /// kAllocateOnDevice allocate its memory, zeroed on that stream.
  ///
  /// @throws InvalidArgumentError  it names an algorithm, or the process uses another GPU.
  /// @throws CommError  no CUDA runtime, no driver or no memory.
  virtual void issue(Operation& operation) = 0;

  /// The same for one end of a message.
  virtual std::shared_ptr<DeviceCall> record(const char* call, int device,
                                             StreamAddress stream) = 0;

  /// Copy pieces of the GPU's memory, as Packer does. After `issue`.
  virtual void copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream) = 0;

  /// What is put on `later` from now on waits for what is on `earlier` by now. After `issue`.
  virtual void order(StreamAddress earlier, StreamAddress later) = 0;

  /// The GPU's half of a group; `issue` has returned once.
  /// @param id  the same on all its ranks, and no other group's that shares a rank with it.
  virtual std::unique_ptr<GpuGroup> join(std::uint64_t id) = 0;
  /// That of two ranks' messages; `record` has returned once.
  virtual std::unique_ptr<GpuPair> join(const Pairing& pairing) = 0;
};

/// Loads nothing yet.
/// @param transport  the same on all ranks.
/// @param mpi_problem  asked at most once, in a thread of its own. None: there is no MPI.
/// @throws CommError  pycomm was built without the GPU plane.
std::unique_ptr<Plane> make_plane(const Places& places, Transport transport,
                                  MpiProblem mpi_problem);

}  // namespace pycomm::nccl
