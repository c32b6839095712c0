#include "collectives/open.h"

#include <cstring>

#include "core/error.h"

namespace pycomm {
namespace {

/// The two most different signatures seen so far, by hash.
struct Extremes {
  struct Entry {
    std::uint64_t hash;
    std::int64_t rank;
    Signature signature;
  };
  Entry lowest;
  Entry highest;

  void include(const Entry& entry) {
    if (entry.hash < lowest.hash) lowest = entry;
    if (entry.hash > highest.hash) highest = entry;
  }
};

static_assert(sizeof(Extremes) <= Staging::kLeastPieceBytes);

Extremes extremes_of_host(const Context& context) {
  const auto entry = [&](int peer) {
    return Extremes::Entry{context.window.announced_hash(peer, context.sequence),
                           context.window.group_rank(peer),
                           context.window.announced_signature(peer, context.sequence)};
  };
  Extremes extremes{entry(0), entry(0)};
  for (int peer = 1; peer < context.window.local_size(); ++peer) extremes.include(entry(peer));
  return extremes;
}

/// Spread every host's extremes to all hosts.
Task<> agree_between_hosts(Context& context) {
  const Lane lane = context.lane(0);
  Extremes mine = extremes_of_host(context);
  // Messages need memory that outlives this coroutine; everybody has finished with the staging.
  const std::span<std::byte> outgoing(context.window.staging(0), sizeof(Extremes));
  const std::span<std::byte> arriving(context.window.staging(0) + Staging::kLeastPieceBytes,
                                      sizeof(Extremes));
  for (int distance = 1; distance < lane.host_count(); distance *= 2) {
    std::memcpy(outgoing.data(), &mine, sizeof(mine));
    const auto received = lane.receive(lane.host - distance, arriving);
    const auto sent = lane.send(lane.host + distance, outgoing);
    co_await until(*received);
    co_await until(*sent);
    Extremes incoming;
    std::memcpy(&incoming, arriving.data(), sizeof(incoming));
    mine.include(incoming.lowest);
    mine.include(incoming.highest);
  }
  if (mine.lowest.hash != mine.highest.hash) {
    throw MismatchError(describe_mismatch(static_cast<int>(mine.lowest.rank), mine.lowest.signature,
                                          static_cast<int>(mine.highest.rank),
                                          mine.highest.signature));
  }
}

}  // namespace

void announce(Context& context, const Operation& operation, std::uint64_t buffer_offset,
              std::span<const std::byte> payload) {
  context.window.check_notices();  // who comes late to a finished group must not get a result
  // The next operation's history is this one's hash, which contains the history before it.
  context.history = context.window.announce(operation, ++context.announced, context.history,
                                            buffer_offset, payload.data(), payload.size());
}

Task<> open_operation(Context& context, const Operation& operation, std::uint64_t buffer_offset,
                      std::span<const std::byte> payload) {
  if (context.announced < context.sequence) announce(context, operation, buffer_offset, payload);
  const bool one_host = context.host_count() == 1;
  Window::AllAnnounced announced(context.window, context.sequence, /*compare=*/one_host);
  co_await until(announced);
  if (one_host) co_return;
  if (context.window.local_rank() == 0) co_await agree_between_hosts(context);
  co_await meet(context);
}

Task<> meet(Context& context) {
  context.window.complete_phase();
  Window::AllCompleted completed(context.window);
  co_await until(completed);
}

}  // namespace pycomm
