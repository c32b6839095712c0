#include "collectives/all_reduce_ring.h"

#include <algorithm>
#include <array>

#include "collectives/partition.h"

namespace pycomm {
namespace {

/// Receives a chunk from the left neighbour segment by segment into two alternating buffers, folds
/// each into `accumulator`, and meanwhile sends `outgoing` to the right.
Task<> fold_step(const Lane& lane, const Share& share, std::span<const std::byte> outgoing,
                 std::span<std::byte> accumulator) {
  const std::size_t element = size_of(share.fold.source_dtype);
  const auto segment_of = [&](std::size_t index, auto chunk) {
    const std::size_t begin = std::min(chunk.size(), index * share.segment_bytes);
    return chunk.subspan(begin, std::min(share.segment_bytes, chunk.size() - begin));
  };
  const auto segments = [&](std::size_t bytes) {
    return (bytes + share.segment_bytes - 1) / share.segment_bytes;
  };
  std::vector<std::unique_ptr<Message>> sent;
  for (std::size_t i = 0; i < segments(outgoing.size()); ++i) {
    sent.push_back(lane.send(lane.host + 1, segment_of(i, outgoing)));
  }
  const std::size_t expected = segments(accumulator.size());
  std::array<std::unique_ptr<Message>, 2> received;
  const auto post = [&](std::size_t i) {
    std::byte* const target = share.received + i % 2 * share.segment_bytes;
    received[i % 2] = lane.receive(lane.host - 1, {target, segment_of(i, accumulator).size()});
  };
  for (std::size_t i = 0; i < std::min<std::size_t>(2, expected); ++i) post(i);
  const FoldSpec partial{share.fold.source_dtype, share.fold.source_dtype, share.fold.op, 1};
  for (std::size_t i = 0; i < expected; ++i) {
    co_await until(*received[i % 2]);
    const auto segment = segment_of(i, accumulator);
    const std::byte* const sources[] = {share.received + i % 2 * share.segment_bytes,
                                        segment.data()};
    fold(partial, segment.data(), sources, segment.size() / element);
    if (i + 2 < expected) post(i + 2);
  }
  for (const auto& message : sent) co_await until(*message);
}

}  // namespace

Task<> all_reduce_ring(const Lane& lane, const Share& share) {
  const int hosts = lane.host_count();
  const std::size_t wire = size_of(share.fold.source_dtype);
  const std::size_t element = size_of(share.fold.destination_dtype);
  const auto chunk = [&](int index) { return partition(share.count, hosts, lane.wrap(index)); };
  const auto partial_sum = [&](int index) {
    const Range range = chunk(index);
    return std::span(share.host_sum + range.begin * wire, range.count() * wire);
  };
  const auto finished = [&](int index) {
    const Range range = chunk(index);
    return std::span(share.result + range.begin * element, range.count() * element);
  };

  for (int step = 0; step < hosts - 1; ++step) {
    co_await fold_step(lane, share, partial_sum(lane.host - step),
                       partial_sum(lane.host - step - 1));
  }
  const std::byte* const owned[] = {partial_sum(lane.host + 1).data()};
  fold(share.fold, finished(lane.host + 1).data(), owned, chunk(lane.host + 1).count());
  for (int step = 0; step < hosts - 1; ++step) {
    const auto received = lane.receive(lane.host - 1, finished(lane.host - step));
    const auto sent = lane.send(lane.host + 1, finished(lane.host + 1 - step));
    co_await until(*received);
    co_await until(*sent);
  }
}

}  // namespace pycomm
