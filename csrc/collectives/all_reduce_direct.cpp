#include "collectives/all_reduce_direct.h"

#include "collectives/partition.h"

namespace pycomm {

Task<> all_reduce_direct(const Lane& lane, const Share& share) {
  const int hosts = lane.host_count();
  const std::size_t wire = size_of(share.fold.source_dtype);
  const std::size_t element = size_of(share.fold.destination_dtype);
  const auto chunk = [&](int host) { return partition(share.count, hosts, lane.wrap(host)); };
  const Range mine = chunk(lane.host);

  std::vector<const std::byte*> sources(static_cast<std::size_t>(hosts));
  sources[static_cast<std::size_t>(lane.host)] = share.host_sum + mine.begin * wire;
  for (int round = 1; round < hosts; ++round) {
    std::byte* const target =
        share.received + static_cast<std::size_t>(round - 1) * mine.count() * wire;
    const Range theirs = chunk(lane.host + round);
    sources[static_cast<std::size_t>(lane.wrap(lane.host - round))] = target;
    const auto received = lane.receive(lane.host - round, {target, mine.count() * wire});
    const auto sent =
        lane.send(lane.host + round, {share.host_sum + theirs.begin * wire, theirs.count() * wire});
    co_await until(*received);
    co_await until(*sent);
  }

  std::byte* const finished = share.result + mine.begin * element;
  fold(share.fold, finished, sources, mine.count());

  for (int round = 1; round < hosts; ++round) {
    const Range theirs = chunk(lane.host - round);
    const auto received = lane.receive(
        lane.host - round, {share.result + theirs.begin * element, theirs.count() * element});
    const auto sent = lane.send(lane.host + round, {finished, mine.count() * element});
    co_await until(*received);
    co_await until(*sent);
  }
}

}  // namespace pycomm
