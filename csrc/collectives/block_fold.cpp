#include "collectives/block_fold.h"

#include <algorithm>
#include <cstring>

#include "collectives/open.h"

namespace pycomm {
namespace {

/// As many elements as fit the staging, which between hosts is cut into four regions: two slots of
/// a piece for every rank; every host's sum; one sum to send, and three finished pieces to spare.
std::size_t choose_piece_count(const Context& context, std::size_t slot_bytes, std::size_t element,
                               std::size_t wire) {
  const auto ranks = static_cast<std::size_t>(context.size());
  std::size_t count = slot_bytes / (ranks * element);
  if (context.host_count() == 1) {
    count = std::min(count, context.staging.piece_bytes / element);
  } else {
    const auto hosts = static_cast<std::size_t>(context.host_count());
    count = std::min({count, slot_bytes / (hosts * wire), slot_bytes / (wire + 3 * element)});
  }
  const std::size_t line = 64 / std::min<std::size_t>(64, element);
  return count > line ? count / line * line : std::max<std::size_t>(1, count);
}

}  // namespace

BlockFold::BlockFold(Context& context, const Operation& operation)
    : context_(context),
      operation_(operation),
      specs_(FoldSpecs::of(operation, context.placement)),
      element_(size_of(operation.dtype)),
      input_bytes_(
          operation.count * element_ *
          (operation.kind == Kind::kReduceScatter ? static_cast<std::size_t>(context.size()) : 1)),
      wire_(size_of(specs_.wire_dtype)),
      slot_bytes_(context.window.staging_bytes() / (context.host_count() == 1 ? 2 : 4)),
      piece_count_(choose_piece_count(context, slot_bytes_, element_, wire_)) {
  for (const int rank : context.ranks_of(context.host())) {
    reads_arenas_ &= context.announced_buffer(rank, input_bytes_) != nullptr;
  }
}

Task<> BlockFold::run(const std::function<Range(int)>& block_of, std::byte* destination) {
  if (!reads_arenas_) {
    copy_in(block_of);
    co_await meet(context_);
  }
  if (context_.host_count() == 1) {
    fold_host(specs_.whole, context_.rank, block_of(context_.rank), destination);
  } else {
    co_await fold_between_hosts(block_of, destination);
  }
  ++runs_;
}

std::byte* BlockFold::region(int peer, std::size_t index) const {
  return context_.window.staging(peer) + index * slot_bytes_;
}

int BlockFold::folder_of(int owner) const {
  return context_.placement.folder(context_.host(), owner);
}

std::byte* BlockFold::place(int peer, int owner) const {
  return region(peer, runs_ % 2) + static_cast<std::size_t>(owner) * piece_count_ * element_;
}

void BlockFold::copy_in(const std::function<Range(int)>& block_of) const {
  for (int owner = 0; owner < context_.size(); ++owner) {
    const Range block = block_of(owner);
    if (folder_of(owner) == context_.rank || block.count() == 0) continue;
    std::memcpy(place(context_.window.local_rank(), owner),
                operation_.input + block.begin * element_, block.count() * element_);
  }
}

void BlockFold::fold_host(const FoldSpec& spec, int owner, const Range& block,
                          std::byte* destination) {
  sources_.clear();
  for (int peer = 0; peer < context_.window.local_size(); ++peer) {
    const std::size_t begin = block.begin * element_;
    if (peer == context_.window.local_rank()) {
      sources_.push_back(operation_.input + begin);
    } else if (reads_arenas_) {
      sources_.push_back(context_.window.announced_buffer(peer, context_.sequence, input_bytes_) +
                         begin);
    } else {
      sources_.push_back(place(peer, owner));
    }
  }
  fold(spec, destination, sources_, block.count());
}

Task<> BlockFold::fold_between_hosts(const std::function<Range(int)>& block_of,
                                     std::byte* destination) {
  const int hosts = context_.host_count();
  const int me = context_.window.local_rank();
  const Range mine = block_of(context_.rank);
  std::byte* const outgoing = region(me, 3);
  const auto sum_of = [&](int host) {
    return region(me, 2) + static_cast<std::size_t>(host) * piece_count_ * wire_;
  };
  for (int round = 1; round < hosts; ++round) {
    const int from_host = (context_.host() - round + hosts) % hosts;
    const auto& senders = context_.ranks_of(from_host);
    const int from = senders[static_cast<std::size_t>(me) % senders.size()];
    std::unique_ptr<Message> received;
    if (mine.count() > 0) {
      received = context_.channel->receive(context_.world_rank(from), context_.tag,
                                           {sum_of(from_host), mine.count() * wire_});
    }
    for (const int owner : context_.ranks_of((context_.host() + round) % hosts)) {
      const Range theirs = block_of(owner);
      if (folder_of(owner) != context_.rank || theirs.count() == 0) continue;
      fold_host(specs_.of_host, owner, theirs, outgoing);
      const auto sent = context_.channel->send(context_.world_rank(owner), context_.tag,
                                               {outgoing, theirs.count() * wire_});
      co_await until(*sent);
    }
    if (received) co_await until(*received);
  }
  if (mine.count() == 0) co_return;
  fold_host(specs_.of_host, context_.rank, mine, sum_of(context_.host()));
  sources_.clear();
  for (int host = 0; host < hosts; ++host) sources_.push_back(sum_of(host));
  fold(specs_.of_hosts, destination, sources_, mine.count());
}

}  // namespace pycomm
