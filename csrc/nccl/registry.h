#pragma once

#include <list>
#include <memory>

#include "collectives/context.h"
#include "core/device_memory.h"
#include "core/task.h"
#include "nccl/communicator.h"

namespace pycomm::nccl {

/// The memory that a communicator knows, so that NCCL sends from it and receives into it without a
/// copy: as a window of all ranks where it can (its symmetric kernels work on nothing else), else
/// as a buffer of each rank, else not at all. Belongs to the progress thread.
///
/// Making memory known is an operation of its own in the group's queue rather than a part of the
/// first collective that finds itself on such memory: all ranks have to do it in the same order,
/// none sees from a pointer what the others have done with theirs, and an operation's opening says
/// by name if one does something else instead.
///
/// NCCL may hang if memory is registered or deregistered while a kernel of the communicator runs
/// (github.com/NVIDIA/nccl/issues/2184): neither happens here unless the stream is empty.
class Registry {
 public:
  /// Make memory known; the ranks' sizes may differ. Collective, as a part of the current call of
  /// `context`; while it lasts nobody else launches anything on this GPU.
  Task<> add(Context& context, const Communicator& communicator,
             std::shared_ptr<DeviceMemory> memory);

  /// Whether nobody but this registry holds some of the memory any more, or it is on its way out.
  bool has_abandoned() const;

  /// Go on with letting abandoned memory go: the communicator forgets it, then it is freed. Not a
  /// collective. Only while none of the communicator's calls is on the GPU or on its way there.
  void drop_abandoned(const Communicator& communicator);

  /// The communicator forgets all memory, since it is about to end; waits for that. The memory
  /// stays to whoever holds it.
  void withdraw(const Communicator& communicator);

  /// The communicator is gone, and has forgotten all memory by that.
  void clear();

 private:
  struct Entry {
    std::shared_ptr<DeviceMemory> memory;  // null: let go
    ncclWindow_t window = nullptr;
    void* buffer = nullptr;
    bool leaves = false;  // NCCL has been asked to forget it

    bool abandoned() const { return memory != nullptr && (leaves || memory.use_count() == 1); }
  };
  static void deregister(const Communicator& communicator, Entry& entry);

  std::list<Entry> entries_;  // NCCL writes into them later, and add() comes back to its own
};

}  // namespace pycomm::nccl
