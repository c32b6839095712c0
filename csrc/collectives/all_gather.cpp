#include "collectives/all_gather.h"

#include <algorithm>
#include <cstring>

#include "collectives/open.h"

namespace pycomm {
namespace {

/// Staging of an all-gather: two slots for the rank's own pieces, alternating, so that a fast rank
/// fills one while a slow one still reads the other; behind them, on the first rank of a host, one
/// piece of every rank of the other hosts.
class StagedAllGather {
 public:
  StagedAllGather(Context& context, const Operation& operation)
      : context_(context),
        operation_(operation),
        bytes_(operation.count * size_of(operation.dtype)),
        slot_bytes_(context.window.staging_bytes() / 4),
        piece_bytes_(context.host_count() == 1
                         ? slot_bytes_
                         : std::min(slot_bytes_,
                                    2 * slot_bytes_ / static_cast<std::size_t>(context.size()))) {}

  Task<> run() {
    const std::size_t pieces = (bytes_ + piece_bytes_ - 1) / piece_bytes_;
    for (std::size_t i = 0; i < pieces; ++i) {
      const std::size_t begin = i * piece_bytes_;
      const std::size_t length = std::min(piece_bytes_, bytes_ - begin);
      std::memcpy(slot(context_.window.local_rank(), i), operation_.input + begin, length);
      co_await meet(context_);
      if (context_.host_count() > 1) {
        if (context_.window.local_rank() == 0) co_await exchange(i, length);
        co_await meet(context_);
      }
      for (int rank = 0; rank < context_.size(); ++rank) {
        std::memcpy(operation_.output + static_cast<std::size_t>(rank) * bytes_ + begin,
                    piece_of(rank, i), length);
      }
    }
  }

 private:
  std::byte* slot(int peer, std::size_t i) const {
    return context_.window.staging(peer) + i % 2 * slot_bytes_;
  }
  /// Where the first rank of this host puts the piece of a rank of another host.
  std::byte* foreign(int rank) const {
    return context_.window.staging(0) + 2 * slot_bytes_ +
           static_cast<std::size_t>(rank) * piece_bytes_;
  }
  const std::byte* piece_of(int rank, std::size_t i) const {
    const auto at = static_cast<std::size_t>(rank);
    return context_.placement.host_of[at] == context_.host()
               ? slot(context_.placement.local_rank_of[at], i)
               : foreign(rank);
  }

  Task<> exchange(std::size_t i, std::size_t length) {
    const Lane lane = context_.lane(0);
    for (int round = 1; round < lane.host_count(); ++round) {
      std::vector<std::unique_ptr<Message>> messages;
      for (const int rank : context_.ranks_of(lane.wrap(lane.host - round))) {
        messages.push_back(lane.receive(lane.host - round, {foreign(rank), length}));
      }
      for (int peer = 0; peer < context_.window.local_size(); ++peer) {
        messages.push_back(lane.send(lane.host + round, {slot(peer, i), length}));
      }
      for (const auto& message : messages) co_await until(*message);
    }
  }

  Context& context_;
  const Operation& operation_;
  const std::size_t bytes_;
  const std::size_t slot_bytes_;
  const std::size_t piece_bytes_;
};

}  // namespace

Task<> all_gather(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const bool small = context.host_count() == 1 && bytes <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small) payload = {operation.input, bytes};
  co_await open_operation(context, operation, Announcement::kNotInArena, payload);
  if (bytes == 0) co_return;
  if (small) {
    for (int peer = 0; peer < context.window.local_size(); ++peer) {
      const auto rank = static_cast<std::size_t>(context.window.group_rank(peer));
      std::memcpy(operation.output + rank * bytes,
                  context.window.announced_payload(peer, context.sequence, bytes), bytes);
    }
  } else {
    StagedAllGather staged(context, operation);
    co_await staged.run();
  }
}

}  // namespace pycomm
