#include "nccl/communicator.h"

#include <chrono>
#include <thread>
#include <utility>

#include "core/error.h"

namespace pycomm::nccl {
namespace {

constexpr auto kPatience = std::chrono::seconds(10);
constexpr auto kNap = std::chrono::milliseconds(1);

}  // namespace

Communicator::Communicator(std::shared_ptr<const Device> device, const ncclUniqueId& id, int size,
                           int rank)
    : device_(std::move(device)), nccl_(*device_->nccl) {
  const Device::Current current(*device_);
  // NCCL reads as much of it as it knows, so a newer header's does for an older NCCL.
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  check(nccl_.ncclCommInitRankConfig(&handle_, size, id, rank, &config), "ncclCommInitRankConfig");
}

Communicator::Communicator(Communicator& parent)
    : device_(parent.device_), nccl_(parent.nccl_), parent_(&parent) {}

std::unique_ptr<Communicator> Communicator::shrink(std::vector<int> excluded, bool has_failed) {
  if (nccl_.ncclCommShrink == nullptr) {
    throw CommError("NCCL " + nccl_version_text(nccl_.version) + " (" + nccl_.library.path() +
                    ") has no ncclCommShrink, so the ranks that are left cannot go on without the "
                    "lost ones.\n  Start the job again from its last checkpoint, or install NCCL "
                    "2.27 or newer.");
  }
  if (excluded.empty()) {
    throw InvalidArgumentError("shrink: no ranks are excluded.\n  Name the lost ones.");
  }
  std::unique_ptr<Communicator> child(new Communicator(*this));
  const Device::Current current(*device_);
  // Without a configuration it gets this one's: non-blocking, too.
  check(nccl_.ncclCommShrink(handle_, excluded.data(), static_cast<int>(excluded.size()),
                             &child->handle_, nullptr,
                             has_failed ? NCCL_SHRINK_ABORT : NCCL_SHRINK_DEFAULT),
        "ncclCommShrink");
  return child;
}

Communicator::~Communicator() {
  if (parent_ != nullptr) parent_->abort();  // ends NCCL's thread that would write the handle
  if (handle_ == nullptr) return;
  const Device::Current current(*device_);
  try {
    leave();
  } catch (const CommError&) {
    abort();
  }
}

void Communicator::leave() {
  check(nccl_.ncclCommFinalize(handle_), "ncclCommFinalize");
  settle();
  nccl_.ncclCommDestroy(std::exchange(handle_, nullptr));
}

void Communicator::settle() const {
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!accepted()) {
    if (std::chrono::steady_clock::now() > deadline) {
      throw CommTimeoutError("NCCL: nothing has become of a call for 10 s.");
    }
    std::this_thread::sleep_for(kNap);
  }
}

bool Communicator::accepted() const {
  if (parent_ != nullptr) {
    if (!parent_->accepted()) return false;
    parent_ = nullptr;
  }
  if (handle_ == nullptr) throw CommError("NCCL: the communicator was aborted.");
  ncclResult_t state = ncclSuccess;
  check(nccl_.ncclCommGetAsyncError(handle_, &state), "ncclCommGetAsyncError");
  check(state, "a call before");
  return state == ncclSuccess;
}

void Communicator::check(ncclResult_t result, const char* call) const {
  if (result == ncclSuccess || result == ncclInProgress) return;
  const std::string last = handle_ != nullptr ? nccl_.ncclGetLastError(handle_) : "";
  const std::string text = std::string("NCCL: ") + call +
                           " failed: " + nccl_.ncclGetErrorString(result) +
                           (last.empty() ? "" : " (" + last + ")") +
                           ".\n  Read the other ranks' logs; NCCL_DEBUG=WARN makes NCCL say more.";
  if (result == ncclRemoteError) throw PeerLostError(text);
  throw CommError(text);
}

void Communicator::abort() {
  if (handle_ == nullptr) return;
  const Device::Current current(*device_);
  nccl_.ncclCommAbort(std::exchange(handle_, nullptr));
}

}  // namespace pycomm::nccl
