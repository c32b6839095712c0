#include "collectives/immediate.h"

#include "collectives/all_reduce_window.h"
#include "collectives/open.h"
#include "core/pause.h"

namespace pycomm {
namespace {

/// Looks without a pause, which alone takes half as long as a cache line.
constexpr int kEagerLooks = 64;

std::size_t payload_bytes(const Operation& operation) {
  return operation.kind == Kind::kAllReduce ? operation.count * size_of(operation.dtype) : 0;
}

}  // namespace

bool is_immediate(const Context& context, const Operation& operation) {
  return context.host_count() == 1 &&
         (operation.kind == Kind::kAllReduce || operation.kind == Kind::kBarrier) &&
         payload_bytes(operation) <= Announcement::kEagerBytes;
}

bool run_immediately(Context& context, const Operation& operation, int looks) {
  announce(context, operation, Announcement::kNotInArena,
           {operation.input, payload_bytes(operation)});
  Window::AllAnnounced announced(context.window, context.announced, /*compare=*/true);
  for (int look = 0; !announced.poll(); ++look) {
    if (look == looks) return false;
    if (look >= kEagerLooks) pause();
  }
  context.sequence = context.announced;
  if (operation.kind == Kind::kAllReduce) all_reduce_announced(context, operation);
  return true;
}

}  // namespace pycomm
