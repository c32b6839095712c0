#include "nccl/registry.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "nccl/everyones.h"

namespace pycomm::nccl {
Task<> Registry::add(Context& context, const Communicator& communicator,
                     std::shared_ptr<DeviceMemory> memory) {
  const NcclTable& nccl = *communicator.device().nccl;
  Event earlier_calls(communicator.shared_device());
  earlier_calls.record(communicator.device().stream);
  Passed empty(earlier_calls, "this rank's GPU to finish the calls before");
  co_await until(empty);
  Communicator::Accepted accepted(communicator);
  co_await until(accepted);  // also what drop_abandoned() has begun

  std::byte* const data = memory->data();
  const std::size_t bytes = std::max<std::size_t>(memory->bytes(), 1);
  Entry& entry = entries_.emplace_back(Entry{std::move(memory)});
  const auto sizes = co_await everyones<std::uint64_t>(context, bytes, "sizes of memory");
  co_await until(accepted);  // throws if the group has been aborted meanwhile
  const bool equal = std::equal(sizes.begin() + 1, sizes.end(), sizes.begin());
  if (equal && nccl.ncclCommWindowRegister && nccl.ncclCommWindowDeregister) {
    {
      const Device::Current current(communicator.device());
      communicator.check(nccl.ncclCommWindowRegister(communicator.handle(), data, bytes,
                                                     &entry.window, NCCL_WIN_COLL_SYMMETRIC),
                         "ncclCommWindowRegister");
    }
    co_await until(accepted);  // writes the window; null: it knows none between these GPUs
    const auto windows =
        co_await everyones<std::uint64_t>(context, entry.window != nullptr, "windows");
    co_await until(accepted);
    if (std::find(windows.begin(), windows.end(), 0) == windows.end()) co_return;
    deregister(communicator, entry);  // a window that others lack
    entry.leaves = false;
    co_await until(accepted);
  }
  if (nccl.ncclCommRegister == nullptr || nccl.ncclCommDeregister == nullptr) co_return;
  {
    const Device::Current current(communicator.device());
    communicator.check(nccl.ncclCommRegister(communicator.handle(), data, bytes, &entry.buffer),
                       "ncclCommRegister");
  }
  co_await until(accepted);
}

void Registry::deregister(const Communicator& communicator, Entry& entry) {
  const NcclTable& nccl = *communicator.device().nccl;
  const Device::Current current(communicator.device());
  entry.leaves = true;
  if (const auto window = std::exchange(entry.window, nullptr); window != nullptr) {
    communicator.check(nccl.ncclCommWindowDeregister(communicator.handle(), window),
                       "ncclCommWindowDeregister");
  }
  if (void* const buffer = std::exchange(entry.buffer, nullptr); buffer != nullptr) {
    communicator.check(nccl.ncclCommDeregister(communicator.handle(), buffer),
                       "ncclCommDeregister");
  }
}

bool Registry::has_abandoned() const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& entry) { return entry.abandoned(); });
}

void Registry::drop_abandoned(const Communicator& communicator) {
  if (!communicator.accepted()) return;
  entries_.remove_if([](const Entry& entry) { return entry.leaves; });
  const auto next = std::find_if(entries_.begin(), entries_.end(),
                                 [](const Entry& entry) { return entry.abandoned(); });
  if (next != entries_.end()) deregister(communicator, *next);
}

void Registry::withdraw(const Communicator& communicator) {
  for (Entry& entry : entries_) {
    communicator.settle();
    deregister(communicator, entry);
  }
  communicator.settle();
}

void Registry::clear() {
  for (Entry& entry : entries_) entry = {};
}

}  // namespace pycomm::nccl
