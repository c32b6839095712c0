#include "collectives/open.h"

#include <algorithm>
#include <cstring>

#include "collectives/extremes.h"

namespace pycomm {
namespace {

static_assert(sizeof(Extremes) <= 2 * Staging::kLeastPieceBytes);

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

/// Spread every host's extremes to all hosts, and every host's sum with them.
Task<const std::byte*> agree_between_hosts(Context& context, const HostSum& sum) {
  const Lane lane = context.lane(0);
  Extremes mine = extremes_of_host(context);
  // Messages need memory that outlives this coroutine; everybody has finished with the staging.
  std::byte* const outgoing = context.window.staging(0);
  std::byte* const sums = outgoing + sizeof(Extremes);
  const std::size_t capacity = context.window.staging_bytes() / 2;
  const std::span<std::byte> arriving(outgoing + capacity, capacity);
  if (mine.agree() && sum.bytes > 0) sum.write(sums);
  for (int distance = 1; distance < lane.host_count(); distance *= 2) {
    const auto hosts = static_cast<std::size_t>(std::min(distance, lane.host_count() - distance));
    std::memcpy(outgoing, &mine, sizeof(mine));
    // Whoever knows of a mismatch passes on just that.
    const std::size_t expected = sizeof(Extremes) + hosts * sum.bytes;
    std::size_t length = 0;
    const auto received = lane.receive_at_most(lane.host - distance, arriving, length);
    const auto sent =
        lane.send(lane.host + distance, {outgoing, mine.agree() ? expected : sizeof(Extremes)});
    co_await until(*received);
    co_await until(*sent);
    mine.include_message(arriving.first(length), expected);
    if (!mine.agree() || sum.bytes == 0) continue;
    std::memcpy(sums + static_cast<std::size_t>(distance) * sum.bytes,
                arriving.data() + sizeof(Extremes), hosts * sum.bytes);
  }
  mine.check();
  co_return sums;
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
  if (context.window.local_rank() == 0) co_await agree_between_hosts(context, {0, {}});
  co_await meet(context);
}

Task<const std::byte*> open_with_sums(Context& context, const Operation& operation,
                                      std::span<const std::byte> payload, HostSum sum) {
  if (context.announced < context.sequence) {
    announce(context, operation, Announcement::kNotInArena, payload);
  }
  Window::AllAnnounced announced(context.window, context.sequence, /*compare=*/false);
  co_await until(announced);
  if (context.window.local_rank() == 0) co_await agree_between_hosts(context, sum);
  co_await meet(context);
  co_return context.window.staging(0) + sizeof(Extremes);
}

Task<std::uint64_t> open_with_largest(Context& context, const Operation& operation,
                                      std::uint64_t number) {
  const auto payload = std::as_bytes(std::span(&number, 1));
  const auto read = [](const std::byte* at) {
    std::uint64_t value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  };
  const auto largest_here = [&] {
    std::uint64_t largest = 0;
    for (int peer = 0; peer < context.window.local_size(); ++peer) {
      largest = std::max(
          largest, read(context.window.announced_payload(peer, context.sequence, sizeof(number))));
    }
    return largest;
  };
  if (context.host_count() == 1) {
    co_await open_operation(context, operation, Announcement::kNotInArena, payload);
    co_return largest_here();
  }
  const std::byte* const hosts =
      co_await open_with_sums(context, operation, payload, {sizeof(number), [&](std::byte* sum) {
                                                              const auto mine = largest_here();
                                                              std::memcpy(sum, &mine, sizeof(mine));
                                                            }});
  std::uint64_t largest = 0;
  for (int host = 0; host < context.host_count(); ++host) {
    largest = std::max(largest, read(hosts + static_cast<std::size_t>(host) * sizeof(number)));
  }
  co_return largest;
}

std::size_t agreement_bytes(int host_count, std::size_t sum_bytes) {
  return sizeof(Extremes) + static_cast<std::size_t>(host_count) * sum_bytes;
}

Task<> meet(Context& context) {
  context.window.complete_phase();
  Window::AllCompleted completed(context.window);
  co_await until(completed);
}

}  // namespace pycomm
