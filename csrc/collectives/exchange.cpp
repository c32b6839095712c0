#include "collectives/exchange.h"

#include <algorithm>
#include <cstring>

#include "collectives/open.h"

namespace pycomm {
namespace {

/// Piece `i` of a block that is cut every `piece_bytes`; empty behind its end.
template <typename Byte>
std::span<Byte> piece_of(std::span<Byte> block, std::size_t i, std::size_t piece_bytes) {
  const std::size_t begin = std::min(block.size(), i * piece_bytes);
  return block.subspan(begin, std::min(piece_bytes, block.size() - begin));
}

std::size_t piece_count(std::size_t bytes, std::size_t piece_bytes) {
  return (bytes + piece_bytes - 1) / piece_bytes;
}

void copy(std::span<std::byte> to, const std::byte* from) {
  if (!to.empty() && to.data() != from) std::memcpy(to.data(), from, to.size());
}

/// The blocks between the ranks of one host. Between hosts it uses the first half of the staging.
class LocalExchange {
 public:
  LocalExchange(Context& context, const Blocks& blocks)
      : context_(context),
        blocks_(blocks),
        me_(context.window.local_rank()),
        slot_bytes_(context.window.staging_bytes() / (context.host_count() == 1 ? 2 : 4)),
        piece_bytes_(std::min(context.staging.piece_bytes,
                              slot_bytes_ / static_cast<std::size_t>(blocks.fan_out))) {}

  Task<> run() {
    const auto self = static_cast<std::size_t>(context_.rank);
    copy(blocks_.incoming[self], blocks_.outgoing[self].data());
    if (!blocks_.readable.empty()) {
      for_each_peer(
          [&](int, std::size_t rank) { copy(blocks_.incoming[rank], blocks_.readable[rank]); });
      co_await meet(context_);  // only now may a peer change what was read
      co_return;
    }
    const std::size_t pieces = piece_count(blocks_.longest_local, piece_bytes_);
    for (std::size_t i = 0; i < pieces; ++i) {
      for_each_peer([&](int peer, std::size_t rank) {
        const auto piece = piece_of(blocks_.outgoing[rank], i, piece_bytes_);
        copy({place(me_, peer, i), piece.size()}, piece.data());
      });
      co_await meet(context_);
      for_each_peer([&](int peer, std::size_t rank) {
        copy(piece_of(blocks_.incoming[rank], i, piece_bytes_), place(peer, me_, i));
      });
    }
  }

 private:
  /// Each of the other ranks of this host, beginning behind this one, so that not all read one.
  template <typename Body>
  void for_each_peer(const Body& body) const {
    const int peers = context_.window.local_size();
    for (int distance = 1; distance < peers; ++distance) {
      const int peer = (me_ + distance) % peers;
      body(peer, static_cast<std::size_t>(context_.window.group_rank(peer)));
    }
  }

  /// Where piece `i` from one rank to another lies.
  std::byte* place(int from, int to, std::size_t i) const {
    return context_.window.staging(from) + i % 2 * slot_bytes_ +
           static_cast<std::size_t>(to % blocks_.fan_out) * piece_bytes_;
  }

  Context& context_;
  const Blocks& blocks_;
  const int me_;
  const std::size_t slot_bytes_;
  const std::size_t piece_bytes_;
};

/// The blocks between hosts, through the second half of this rank's own staging.
class RemoteExchange {
 public:
  RemoteExchange(Context& context, const Blocks& blocks)
      : context_(context),
        blocks_(blocks),
        piece_bytes_(context.window.staging_bytes() / 4),
        outgoing_(context.window.staging(context.window.local_rank()) + 2 * piece_bytes_),
        incoming_(outgoing_ + piece_bytes_) {}

  Task<> run() {
    std::vector<int> order;
    for (const auto& ranks : context_.placement.hosts) {
      order.insert(order.end(), ranks.begin(), ranks.end());
    }
    const int p = context_.size();
    const auto position =
        static_cast<int>(std::find(order.begin(), order.end(), context_.rank) - order.begin());
    const auto at = [&](int q) { return order[static_cast<std::size_t>((q + p) % p)]; };
    for (int round = 1; round < p; ++round) {
      const int to = at(position + round);
      const int from = at(position - round);
      co_await swap(from, is_remote(from) ? blocks_.incoming[index(from)] : std::span<std::byte>(),
                    to, is_remote(to) ? blocks_.outgoing[index(to)] : std::span<const std::byte>());
    }
  }

 private:
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }
  bool is_remote(int rank) const {
    return context_.placement.host_of[index(rank)] != context_.host();
  }

  Task<> swap(int from, std::span<std::byte> incoming, int to,
              std::span<const std::byte> outgoing) {
    const std::size_t pieces =
        piece_count(std::max(incoming.size(), outgoing.size()), piece_bytes_);
    for (std::size_t i = 0; i < pieces; ++i) {
      const auto arriving = piece_of(incoming, i, piece_bytes_);
      const auto leaving = piece_of(outgoing, i, piece_bytes_);
      std::unique_ptr<Message> received;
      std::unique_ptr<Message> sent;
      if (!arriving.empty()) {
        received = context_.channel->receive(context_.world_rank(from), context_.tag,
                                             {incoming_, arriving.size()});
      }
      if (!leaving.empty()) {
        copy({outgoing_, leaving.size()}, leaving.data());
        sent = context_.channel->send(context_.world_rank(to), context_.tag,
                                      {outgoing_, leaving.size()});
      }
      if (received) {
        co_await until(*received);
        copy(arriving, incoming_);
      }
      if (sent) co_await until(*sent);
    }
  }

  Context& context_;
  const Blocks& blocks_;
  const std::size_t piece_bytes_;
  std::byte* const outgoing_;
  std::byte* const incoming_;
};

}  // namespace

Task<> exchange(Context& context, const Blocks& blocks) {
  LocalExchange local(context, blocks);
  co_await local.run();
  if (context.host_count() > 1) {
    RemoteExchange remote(context, blocks);
    co_await remote.run();
  }
}

}  // namespace pycomm
