#include "core/fork_guard.h"

#include <pthread.h>

#include <atomic>
#include <mutex>

namespace pycomm {
namespace {

std::atomic<bool> forked{false};

}  // namespace

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

void watch_forks() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked.store(true); }); });
}

}  // namespace pycomm
