#include "collectives/immediate.h"

#include <sched.h>

#include <chrono>

#include "collectives/all_reduce_window.h"
#include "collectives/open.h"
#include "core/pause.h"

namespace pycomm {
namespace {

/// How often a rank with a core of its own looks: 3 to 8 us. At first without a pause, which alone
/// takes half as long as a cache line.
constexpr int kLooks = 128;
constexpr int kEagerLooks = 64;

/// How often a rank without one gives its core away, and how long that may take before it is rather
/// a wait: its caller still keeps what other threads may need (Python's lock).
constexpr int kYields = 16;
constexpr std::chrono::microseconds kLongestYields{50};

std::size_t payload_bytes(const Operation& operation) {
  return operation.kind == Kind::kAllReduce ? operation.count * size_of(operation.dtype) : 0;
}

bool poll_spinning(Wait& wait) {
  for (int look = 0; !wait.poll(); ++look) {
    if (look == kLooks) return false;
    if (look >= kEagerLooks) pause();
  }
  return true;
}

bool poll_yielding(Wait& wait) {
  if (wait.poll()) return true;
  const auto until = std::chrono::steady_clock::now() + kLongestYields;
  for (int yield = 0; yield < kYields; ++yield) {
    sched_yield();
    if (wait.poll()) return true;
    if (std::chrono::steady_clock::now() > until) break;
  }
  return false;
}

}  // namespace

bool is_immediate(const Context& context, const Operation& operation) {
  return context.host_count() == 1 &&
         (operation.kind == Kind::kAllReduce || operation.kind == Kind::kBarrier) &&
         payload_bytes(operation) <= Announcement::kEagerBytes;
}

bool run_immediately(Context& context, const Operation& operation, bool may_spin) {
  announce(context, operation, Announcement::kNotInArena,
           {operation.input, payload_bytes(operation)});
  Window::AllAnnounced announced(context.window, context.announced, /*compare=*/true);
  if (!(may_spin ? poll_spinning(announced) : poll_yielding(announced))) return false;
  context.sequence = context.announced;
  if (operation.kind == Kind::kAllReduce) all_reduce_announced(context, operation);
  return true;
}

}  // namespace pycomm
