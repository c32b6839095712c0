// Group's memory on GPUs: its part for whoever holds and drops it. See nccl/registry.h for NCCL's.

#include <memory>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "group/group.h"
#include "group/process.h"

namespace pycomm {

std::shared_ptr<DeviceMemory> Group::allocate_on_device(std::size_t bytes, int device,
                                                        StreamAddress stream,
                                                        const InterruptCheck& check_interrupt) {
  Operation operation;
  operation.kind = Kind::kAllocateOnDevice;
  operation.count = bytes;
  operation.device = device;
  operation.stream = stream;
  prepare(operation);
  auto memory = operation.device_memory;
  run_there(std::move(operation), check_interrupt);
  // Until the group ends it holds the memory too: so it is the progress thread that frees it.
  DeviceMemory* const address = memory.get();
  return {address, [memory = std::move(memory), group = weak_from_this()](DeviceMemory*) mutable {
            if (in_forked_child()) return;
            memory.reset();
            if (const auto alive = group.lock()) alive->wake();
          }};
}

void Group::wake() {
  try {
    process_->submit(shared_from_this());
  } catch (const CommError&) {
    // pycomm was shut down: the memory is freed with the group.
  }
}

}  // namespace pycomm
