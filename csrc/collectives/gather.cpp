#include "collectives/gather.h"

#include <algorithm>
#include <cstring>

#include "collectives/exchange.h"
#include "collectives/layout.h"
#include "collectives/open.h"

namespace pycomm {

Task<> gather(Context& context, const Operation& operation) {
  const Layout layout = Layout::of_output(operation, context.size());
  const auto me = static_cast<std::size_t>(context.rank);
  const auto root = static_cast<std::size_t>(operation.root);
  const bool is_root = me == root;
  const std::size_t bytes = layout.bytes(me);
  const bool small = context.host_count() == 1 && layout.longest() <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small) payload = {operation.input, bytes};
  co_await open_operation(context, operation, context.arena_offset(operation.input, bytes),
                          payload);
  if (layout.total() == 0) co_return;
  if (small) {
    if (!is_root) co_return;
    for (std::size_t rank = 0; rank < layout.size(); ++rank) {
      if (layout.bytes(rank) == 0) continue;
      std::memcpy(operation.output + layout.begin(rank),
                  context.window.announced_payload(static_cast<int>(rank), context.sequence,
                                                   layout.bytes(rank)),
                  layout.bytes(rank));
    }
    co_return;
  }

  Blocks blocks(context);
  blocks.outgoing[root] = {operation.input, bytes};
  if (is_root) {
    for (std::size_t rank = 0; rank < layout.size(); ++rank) {
      blocks.incoming[rank] = {operation.output + layout.begin(rank), layout.bytes(rank)};
    }
  }
  if (context.host() == context.placement.host_of[root]) {
    bool in_arena = true;
    std::vector<const std::byte*> readable(layout.size());
    for (const int rank : context.ranks_of(context.host())) {
      const auto at = static_cast<std::size_t>(rank);
      if (at == root) continue;
      blocks.longest_local = std::max(blocks.longest_local, layout.bytes(at));
      readable[at] = context.announced_buffer(rank, layout.bytes(at));
      in_arena &= readable[at] != nullptr;
    }
    if (in_arena) blocks.readable = std::move(readable);
  }
  co_await exchange(context, blocks);
}

}  // namespace pycomm
