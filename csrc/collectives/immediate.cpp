#include "collectives/immediate.h"

#include <chrono>

#include "collectives/all_reduce_window.h"
#include "collectives/open.h"
#include "core/clock.h"
#include "core/pause.h"
#include "core/thread.h"

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

/// Takes about 10 us, so that what an Execution costs no longer counts.
constexpr std::size_t kMostBytes = 256 << 10;

template <typename Waiting>
bool poll_spinning(Waiting& wait) {
  for (int look = 0; !wait.poll(); ++look) {
    if (look == kLooks) return false;
    if (look >= kEagerLooks) pause();
  }
  return true;
}

template <typename Waiting>
bool poll_yielding(Waiting& wait) {
  if (wait.poll()) return true;
  const auto until = Clock::now() + kLongestYields;
  for (int yield = 0; yield < kYields; ++yield) {
    yield_core();
    if (wait.poll()) return true;
    if (Clock::now() > until) break;
  }
  return false;
}

template <typename Waiting>
bool ends_at_once(Waiting wait, bool may_spin) {
  return may_spin ? poll_spinning(wait) : poll_yielding(wait);
}

/// Go on with an all-reduce that every rank has announced.
bool finish(Context& context, const Operation& operation, bool may_spin) {
  switch (way_of(context, operation)) {
    case HostWay::kShown:
      fold_shown(context, operation);
      return true;
    case HostWay::kInPlace:
      fold_in_place(context, operation);
      return ends_at_once(Window::AllCompleted(context.window), may_spin);
    case HostWay::kStaged:
      break;
  }
  return false;
}

}  // namespace

bool is_immediate(const Context& context, const Operation& operation) {
  if (context.host_count() > 1) return false;
  return operation.kind == Kind::kBarrier ||
         (operation.kind == Kind::kAllReduce &&
          operation.count * size_of(operation.dtype) <= kMostBytes);
}

bool run_immediately(Context& context, const Operation& operation, bool may_spin) {
  if (operation.kind == Kind::kBarrier) {
    announce(context, operation, Announcement::kNotInArena, {});
  } else {
    announce_all_reduce(context, operation);
  }
  if (!ends_at_once(Window::AllAnnounced(context.window, context.announced, /*compare=*/true),
                    may_spin)) {
    return false;
  }
  ++context.sequence;
  if (operation.kind == Kind::kBarrier || finish(context, operation, may_spin)) return true;
  --context.sequence;  // the Execution counts it
  return false;
}

}  // namespace pycomm
