#include "collectives/immediate.h"

#include "collectives/all_reduce_window.h"
#include "collectives/open.h"
#include "core/pause.h"

namespace pycomm {
namespace {

/// Looks without a pause, which alone takes half as long as a cache line.
constexpr int kEagerLooks = 64;

/// Takes about 10 us, so that what an Execution costs no longer counts.
constexpr std::size_t kMostBytes = 256 << 10;

template <typename Waiting>
bool ends_within(int looks, Waiting waiting) {
  for (int look = 0; !waiting.poll(); ++look) {
    if (look == looks) return false;
    if (look >= kEagerLooks) pause();
  }
  return true;
}

/// Go on with an all-reduce that every rank has announced.
bool finish(Context& context, const Operation& operation, int looks) {
  switch (way_of(context, operation)) {
    case HostWay::kShown:
      fold_shown(context, operation);
      return true;
    case HostWay::kInPlace:
      fold_in_place(context, operation);
      return ends_within(looks, Window::AllCompleted(context.window));
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

bool run_immediately(Context& context, const Operation& operation, int looks) {
  if (operation.kind == Kind::kBarrier) {
    announce(context, operation, Announcement::kNotInArena, {});
  } else {
    announce_all_reduce(context, operation);
  }
  if (!ends_within(looks, Window::AllAnnounced(context.window, context.announced, true))) {
    return false;
  }
  ++context.sequence;
  if (operation.kind == Kind::kBarrier || finish(context, operation, looks)) return true;
  --context.sequence;  // the Execution counts it
  return false;
}

}  // namespace pycomm
