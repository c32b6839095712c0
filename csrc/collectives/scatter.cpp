#include "collectives/scatter.h"

#include <cstring>

#include "collectives/exchange.h"
#include "collectives/open.h"

namespace pycomm {

Task<> scatter(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const std::size_t total = bytes * static_cast<std::size_t>(context.size());
  const auto me = static_cast<std::size_t>(context.rank);
  const auto root = static_cast<std::size_t>(operation.root);
  const bool is_root = me == root;
  const bool small = context.host_count() == 1 && total <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small && is_root) payload = {operation.input, total};
  const std::uint64_t offset =
      is_root ? context.arena_offset(operation.input, total) : Announcement::kNotInArena;
  co_await open_operation(context, operation, offset, payload);
  if (bytes == 0) co_return;
  if (small) {
    const std::byte* const all =
        context.window.announced_payload(operation.root, context.sequence, total);
    std::memcpy(operation.output, all + me * bytes, bytes);
    co_return;
  }

  Blocks blocks(context);
  blocks.incoming[root] = {operation.output, bytes};
  if (is_root) {
    for (std::size_t rank = 0; rank < blocks.outgoing.size(); ++rank) {
      blocks.outgoing[rank] = {operation.input + rank * bytes, bytes};
    }
  }
  if (context.host() == context.placement.host_of[root] && context.window.local_size() > 1) {
    blocks.longest_local = bytes;
    blocks.fan_out = context.window.local_size();
    if (const std::byte* const input = context.announced_buffer(operation.root, total)) {
      blocks.readable.resize(blocks.outgoing.size());
      if (!is_root) blocks.readable[root] = input + me * bytes;
    }
  }
  co_await exchange(context, blocks);
}

}  // namespace pycomm
