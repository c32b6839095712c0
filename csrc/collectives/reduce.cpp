#include "collectives/reduce.h"

#include <cstring>

#include "collectives/all_reduce_window.h"
#include "collectives/block_fold.h"
#include "collectives/open.h"
#include "collectives/partition.h"

namespace pycomm {
namespace {

/// Between hosts: fold the parts of a piece to all ranks, then bring them to the root.
class HostsReduce {
 public:
  HostsReduce(Context& context, const Operation& operation)
      : context_(context),
        operation_(operation),
        element_(size_of(operation.dtype)),
        root_host_(context.placement.host_of[static_cast<std::size_t>(operation.root)]),
        fold_(context, operation) {}

  Task<> run() {
    const std::size_t step = fold_.piece_count() * static_cast<std::size_t>(context_.size());
    for (std::size_t begin = 0, i = 0; begin < operation_.count; begin += step, ++i) {
      const Range piece{begin, std::min(operation_.count, begin + step)};
      const std::function<Range(int)> part_of = [&](int rank) {
        const Range part = partition(piece.count(), context_.size(), rank);
        return Range{begin + part.begin, begin + part.end};
      };
      const Range mine = part_of(context_.rank);
      std::byte* const finished =
          is_root() ? operation_.output + mine.begin * element_ : place(local_rank(), i);
      co_await fold_.run(part_of, finished);
      if (context_.host() != root_host_) {
        if (mine.count() > 0) co_await send(finished, mine.count() * element_);
        continue;
      }
      co_await meet(context_);
      if (!is_root()) continue;
      for (int rank = 0; rank < context_.size(); ++rank) {
        const Range part = part_of(rank);
        if (rank != context_.rank && part.count() > 0) co_await collect(rank, part, i);
      }
    }
    if (fold_.reads_arenas()) co_await meet(context_);  // only now may a peer change its input
  }

 private:
  bool is_root() const { return context_.rank == operation_.root; }
  int local_rank() const { return context_.window.local_rank(); }
  /// Two places alternate for what a rank has finished; a third is for what the root receives.
  std::byte* place(int peer, std::size_t i) const {
    return fold_.spare(peer) + i % 2 * fold_.piece_count() * element_;
  }

  Task<> send(std::byte* finished, std::size_t bytes) {
    const auto sent = context_.channel->send(context_.world_rank(operation_.root), context_.tag,
                                             {finished, bytes});
    co_await until(*sent);
  }

  Task<> collect(int rank, const Range& part, std::size_t i) {
    const auto at = static_cast<std::size_t>(rank);
    std::byte* source;
    if (context_.placement.host_of[at] == root_host_) {
      source = place(context_.placement.local_rank_of[at], i);
    } else {
      source = fold_.spare(local_rank()) + 2 * fold_.piece_count() * element_;
      const auto received = context_.channel->receive(context_.world_rank(rank), context_.tag,
                                                      {source, part.count() * element_});
      co_await until(*received);
    }
    std::memcpy(operation_.output + part.begin * element_, source, part.count() * element_);
  }

  Context& context_;
  const Operation& operation_;
  const std::size_t element_;
  const int root_host_;
  BlockFold fold_;
};

}  // namespace

Task<> reduce(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const bool small = context.host_count() == 1 && bytes <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small) payload = {operation.input, bytes};
  co_await open_operation(context, operation, context.arena_offset(operation.input, bytes),
                          payload);
  if (bytes == 0) co_return;
  if (small) {
    if (context.rank == operation.root) fold_shown(context, operation);
  } else if (context.host_count() == 1) {
    co_await reduce_window(context, operation);
  } else {
    HostsReduce between_hosts(context, operation);
    co_await between_hosts.run();
  }
}

}  // namespace pycomm
