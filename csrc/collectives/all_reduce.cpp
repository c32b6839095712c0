#include "collectives/all_reduce.h"

#include "collectives/all_reduce_hierarchical.h"
#include "collectives/all_reduce_window.h"
#include "collectives/open.h"

namespace pycomm {

Task<> all_reduce(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const bool in_place = operation.input == operation.output;
  const std::uint64_t offset =
      in_place ? context.arena_offset(operation.input, bytes) : Announcement::kNotInArena;
  if (context.host_count() > 1) {
    co_await open_operation(context, operation, offset, {});
    co_await all_reduce_hierarchical(context, operation);
  } else if (bytes <= Announcement::kEagerBytes) {
    co_await open_operation(context, operation, offset, {operation.input, bytes});
    all_reduce_announced(context, operation);
  } else {
    co_await open_operation(context, operation, offset, {});
    co_await all_reduce_window(context, operation);
  }
}

}  // namespace pycomm
