#include "collectives/all_reduce_direct.h"

#include <algorithm>
#include <span>

namespace pycomm {
namespace {

/// Segments still to come when the next round begins: they cover the way there, no more.
constexpr LaneStream::Ticket kOverlap = 2;

}  // namespace

DirectExchange::DirectExchange(LaneStream& stream, const Share& share)
    : stream_(stream),
      share_(share),
      host_(stream.lane().host),
      hosts_(stream.lane().host_count()),
      segments_(segments_of(share.count, hosts_, share.wire())),
      mine_(chunk(host_)),
      sources_(static_cast<std::size_t>(hosts_)) {
  sources_[static_cast<std::size_t>(host_)] = share.host_sum + mine_.begin * share.wire();
}

Range DirectExchange::chunk(int host) const {
  return partition(share_.count, hosts_, stream_.lane().wrap(host));
}

LaneStream::Ticket DirectExchange::turn() const {
  return std::max(stream_.last_receive(), kOverlap) - kOverlap;
}

void DirectExchange::begin() {
  const std::size_t wire = share_.wire();
  for (int round = 1; round < hosts_; ++round) {
    std::byte* const target =
        share_.received + static_cast<std::size_t>(round - 1) * mine_.count() * wire;
    sources_[static_cast<std::size_t>(stream_.lane().wrap(host_ - round))] = target;
    before_last_round_ = stream_.last_receive();
    const LaneStream::Ticket after = turn();
    for (std::size_t i = 0; i < segments_; ++i) {
      const Range outgoing = segment(chunk(host_ + round), segments_, i);
      const Range incoming = segment({0, mine_.count()}, segments_, i);
      stream_.send(host_ + round,
                   {share_.host_sum + outgoing.begin * wire, outgoing.count() * wire}, after);
      stream_.receive(host_ - round, {target + incoming.begin * wire, incoming.count() * wire});
    }
  }
}

Task<> DirectExchange::finish() {
  const std::size_t wire = share_.wire();
  const std::size_t element = share_.element();
  const auto finished = [&](int host, std::size_t i) {
    const Range range = segment(chunk(host), segments_, i);
    return std::span(share_.result + range.begin * element, range.count() * element);
  };
  std::vector<LaneStream::Ticket> turns;
  for (int round = 1; round < hosts_; ++round) {
    turns.push_back(turn());
    for (std::size_t i = 0; i < segments_; ++i) {
      stream_.receive(host_ - round, finished(host_ - round, i));
    }
  }
  for (std::size_t i = 0; i < segments_; ++i) {
    auto arrived = stream_.received(before_last_round_ + i + 1);
    co_await until(arrived);
    const Range range = segment({0, mine_.count()}, segments_, i);
    std::vector<const std::byte*> sources;
    for (const std::byte* const source : sources_) sources.push_back(source + range.begin * wire);
    fold(share_.fold, finished(host_, i).data(), sources, range.count());
    stream_.send(host_ + 1, finished(host_, i), turns[0]);
  }
  for (int round = 2; round < hosts_; ++round) {
    for (std::size_t i = 0; i < segments_; ++i) {
      stream_.send(host_ + round, finished(host_, i), turns[static_cast<std::size_t>(round - 1)]);
    }
  }
}

}  // namespace pycomm
