#include "collectives/all_to_all.h"

#include <algorithm>
#include <cstring>

#include "collectives/block_counts.h"
#include "collectives/exchange.h"
#include "collectives/layout.h"
#include "collectives/open.h"

namespace pycomm {
namespace {

/// Every rank announced its whole input, p equal blocks.
void copy_announced(const Context& context, const Operation& operation, const Layout& layout) {
  const auto me = static_cast<std::size_t>(context.rank);
  for (int peer = 0; peer < context.window.local_size(); ++peer) {
    const auto rank = static_cast<std::size_t>(context.window.group_rank(peer));
    const std::byte* const theirs =
        context.window.announced_payload(peer, context.sequence, layout.total());
    std::memcpy(operation.output + layout.begin(rank), theirs + layout.begin(me),
                layout.bytes(rank));
  }
}

}  // namespace

Task<> all_to_all(Context& context, const Operation& operation) {
  const Layout input = Layout::of_input(operation, context.size());
  const Layout output = Layout::of_output(operation, context.size());
  const bool given = has_block_counts(operation);
  const bool small =
      !given && context.host_count() == 1 && input.total() <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small) payload = {operation.input, input.total()};
  co_await open_operation(context, operation, context.arena_offset(operation.input, input.total()),
                          payload);
  if (!given && input.total() == 0) co_return;
  if (small) {
    copy_announced(context, operation, output);
    co_return;
  }

  Blocks blocks(context);
  blocks.fan_out = context.window.local_size();
  for (std::size_t rank = 0; rank < input.size(); ++rank) {
    blocks.outgoing[rank] = {operation.input + input.begin(rank), input.bytes(rank)};
    blocks.incoming[rank] = {operation.output + output.begin(rank), output.bytes(rank)};
  }
  // By rank of this host, where my block begins in its input.
  const auto me = static_cast<std::size_t>(context.rank);
  std::vector<std::size_t> begins(input.size(), input.begin(me));
  blocks.longest_local = input.longest();
  if (given) {
    BlockCounts counts(context, operation);
    co_await counts.agree();
    const std::size_t element = size_of(operation.dtype);
    blocks.longest_local = counts.longest_local() * element;
    for (const int rank : context.ranks_of(context.host())) {
      begins[static_cast<std::size_t>(rank)] = counts.elements_before_mine(rank) * element;
    }
    co_await meet(context);  // the counts lie where the blocks go
  }

  bool in_arena = true;
  std::vector<const std::byte*> readable(input.size());
  for (const int rank : context.ranks_of(context.host())) {
    const auto at = static_cast<std::size_t>(rank);
    const std::byte* const theirs = context.announced_buffer(rank, begins[at] + output.bytes(at));
    in_arena &= theirs != nullptr;
    if (in_arena) readable[at] = theirs + begins[at];
  }
  if (in_arena) blocks.readable = std::move(readable);
  co_await exchange(context, blocks);
}

}  // namespace pycomm
