#include "collectives/all_gather.h"

#include <algorithm>
#include <cstring>

#include "collectives/layout.h"
#include "collectives/open.h"
#include "collectives/partition.h"

namespace pycomm {
namespace {

class AllGather {
 public:
  AllGather(Context& context, const Operation& operation)
      : context_(context),
        operation_(operation),
        layout_(Layout::of_output(operation, context.size())),
        me_(static_cast<std::size_t>(context.rank)),
        slot_bytes_(context.window.staging_bytes() / 2),
        piece_bytes_(context.host_count() == 1
                         ? std::min(context.staging.piece_bytes, slot_bytes_)
                         : slot_bytes_ / static_cast<std::size_t>(context.size())) {}

  bool small() const {
    return context_.host_count() == 1 && layout_.longest() <= Announcement::kEagerBytes;
  }

  Task<> run() {
    const std::size_t bytes = layout_.bytes(me_);
    std::span<const std::byte> payload;
    if (small()) payload = {operation_.input, bytes};
    co_await open_operation(context_, operation_, context_.arena_offset(operation_.input, bytes),
                            payload);
    copy_own();
    if (small()) {
      copy_announced();
    } else if (context_.host_count() == 1 && all_in_arena()) {
      copy_from_arenas();
      co_await meet(context_);  // only now may a peer change its input
    } else {
      co_await staged();
    }
  }

 private:
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }
  bool is_here(std::size_t rank) const {
    return context_.placement.host_of[rank] == context_.host();
  }

  void copy_own() const {
    std::byte* const place = operation_.output + layout_.begin(me_);
    if (layout_.bytes(me_) > 0 && place != operation_.input) {
      std::memcpy(place, operation_.input, layout_.bytes(me_));
    }
  }

  void copy_announced() const {
    for (int peer = 0; peer < context_.window.local_size(); ++peer) {
      const std::size_t rank = index(context_.window.group_rank(peer));
      const std::size_t bytes = layout_.bytes(rank);
      if (rank == me_ || bytes == 0) continue;
      std::memcpy(operation_.output + layout_.begin(rank),
                  context_.window.announced_payload(peer, context_.sequence, bytes), bytes);
    }
  }

  const std::byte* announced_buffer(int rank) const {
    return context_.announced_buffer(rank, layout_.bytes(index(rank)));
  }

  bool all_in_arena() const {
    for (int rank = 0; rank < context_.size(); ++rank) {
      if (announced_buffer(rank) == nullptr) return false;
    }
    return true;
  }

  /// Begins behind this rank, so that not all read the same one.
  void copy_from_arenas() const {
    for (int distance = 1; distance < context_.size(); ++distance) {
      const int rank = (context_.rank + distance) % context_.size();
      std::memcpy(operation_.output + layout_.begin(index(rank)), announced_buffer(rank),
                  layout_.bytes(index(rank)));
    }
  }

  Task<> staged() {
    const std::size_t pieces = (layout_.longest() + piece_bytes_ - 1) / piece_bytes_;
    for (std::size_t i = 0; i < pieces; ++i) {
      if (const Range mine = piece(me_, i); mine.count() > 0) {
        std::memcpy(place(me_, i), operation_.input + mine.begin, mine.count());
      }
      if (context_.host_count() > 1) co_await exchange(i);
      co_await meet(context_);
      for (std::size_t distance = 1; distance < layout_.size(); ++distance) {
        const std::size_t rank = (me_ + distance) % layout_.size();
        const Range theirs = piece(rank, i);
        if (theirs.count() == 0) continue;
        std::memcpy(operation_.output + layout_.begin(rank) + theirs.begin, place(rank, i),
                    theirs.count());
      }
    }
  }

  /// Bytes of a rank's block.
  Range piece(std::size_t rank, std::size_t i) const {
    const std::size_t begin = std::min(layout_.bytes(rank), i * piece_bytes_);
    return {begin, std::min(layout_.bytes(rank), begin + piece_bytes_)};
  }

  /// Which rank of a host keeps the pieces of a rank of another host for it.
  int keeper(int host, std::size_t rank) const {
    const auto& ranks = context_.ranks_of(host);
    return ranks[index(context_.placement.local_rank_of[rank]) % ranks.size()];
  }

  /// Where on this host piece `i` of any rank lies: with that rank, or with its keeper. A slot
  /// between hosts has a place for every rank.
  std::byte* place(std::size_t rank, std::size_t i) const {
    const std::size_t holder = is_here(rank) ? rank : index(keeper(context_.host(), rank));
    const std::size_t position = context_.host_count() == 1 ? 0 : rank;
    return context_.window.staging(context_.placement.local_rank_of[holder]) + i % 2 * slot_bytes_ +
           position * piece_bytes_;
  }

  Task<> exchange(std::size_t i) {
    const int hosts = context_.host_count();
    const std::size_t mine = piece(me_, i).count();
    std::vector<std::unique_ptr<Message>> messages;
    for (int round = 1; round < hosts; ++round) {
      messages.clear();
      for (const int rank : context_.ranks_of((context_.host() - round + hosts) % hosts)) {
        const std::size_t bytes = piece(index(rank), i).count();
        if (bytes == 0 || keeper(context_.host(), index(rank)) != context_.rank) continue;
        messages.push_back(context_.channel->receive(context_.world_rank(rank), context_.tag,
                                                     {place(index(rank), i), bytes}));
      }
      if (mine > 0) {
        const int to = keeper((context_.host() + round) % hosts, me_);
        messages.push_back(
            context_.channel->send(context_.world_rank(to), context_.tag, {place(me_, i), mine}));
      }
      for (const auto& message : messages) co_await until(*message);
    }
  }

  Context& context_;
  const Operation& operation_;
  const Layout layout_;
  const std::size_t me_;
  const std::size_t slot_bytes_;
  const std::size_t piece_bytes_;
};

}  // namespace

Task<> all_gather(Context& context, const Operation& operation) {
  AllGather gather(context, operation);
  co_await gather.run();
}

}  // namespace pycomm
