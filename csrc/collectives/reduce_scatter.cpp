#include "collectives/reduce_scatter.h"

#include "collectives/block_fold.h"
#include "collectives/fold_specs.h"
#include "collectives/open.h"

namespace pycomm {

Task<> reduce_scatter(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const auto me = static_cast<std::size_t>(context.rank);
  const std::size_t total = bytes * static_cast<std::size_t>(context.size());
  const bool small = context.host_count() == 1 && total <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small) payload = {operation.input, total};
  co_await open_operation(context, operation, context.arena_offset(operation.input, total),
                          payload);
  if (operation.count == 0) co_return;
  if (small) {
    std::vector<const std::byte*> sources;
    for (int peer = 0; peer < context.window.local_size(); ++peer) {
      sources.push_back(context.window.announced_payload(peer, context.sequence, total) +
                        me * bytes);
    }
    fold(FoldSpecs::of(operation, context.placement).whole, operation.output, sources,
         operation.count);
    co_return;
  }

  BlockFold blocks(context, operation);
  const std::size_t step = blocks.piece_count();
  for (std::size_t begin = 0; begin < operation.count; begin += step) {
    const std::size_t end = std::min(operation.count, begin + step);
    const std::function<Range(int)> block_of = [&](int rank) {
      const std::size_t block = static_cast<std::size_t>(rank) * operation.count;
      return Range{block + begin, block + end};
    };
    co_await blocks.run(block_of, operation.output + begin * size_of(operation.dtype));
  }
  if (blocks.reads_arenas()) co_await meet(context);  // only now may a peer change its input
}

}  // namespace pycomm
