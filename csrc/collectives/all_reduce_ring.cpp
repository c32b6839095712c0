#include "collectives/all_reduce_ring.h"

namespace pycomm {

RingExchange::RingExchange(LaneStream& stream, const Share& share)
    : stream_(stream),
      share_(share),
      host_(stream.lane().host),
      hosts_(stream.lane().host_count()),
      segments_(segments_of(share.count, hosts_, share.wire())) {}

Range RingExchange::segment_of(int chunk, std::size_t index) const {
  return segment(partition(share_.count, hosts_, stream_.lane().wrap(chunk)), segments_, index);
}

void RingExchange::send_partial(const Range& segment) {
  stream_.send(host_ + 1, {partial_sum(segment), segment.count() * share_.wire()});
}

void RingExchange::send_finished(const Range& segment) {
  stream_.send(host_ + 1, {share_.result + segment.begin * share_.element(),
                           segment.count() * share_.element()});
}

void RingExchange::finish_segment(const Range& segment) const {
  const std::byte* const owned[] = {partial_sum(segment)};
  fold(share_.fold, share_.result + segment.begin * share_.element(), owned, segment.count());
}

void RingExchange::begin() {
  arrived_ = stream_.last_receive();
  // Chunks h-1 to h-H+1 come one after the other; together they fit beside the host's sum.
  std::byte* target = share_.received;
  for (int step = 0; step < hosts_ - 1; ++step) {
    for (std::size_t i = 0; i < segments_; ++i) {
      const std::size_t bytes = segment_of(host_ - step - 1, i).count() * share_.wire();
      stream_.receive(host_ - 1, {target, bytes});
      target += bytes;
    }
  }
  for (std::size_t i = 0; i < segments_; ++i) send_partial(segment_of(host_, i));
}

Task<> RingExchange::finish() {
  const FoldSpec partial{share_.fold.source_dtype, share_.fold.source_dtype, share_.fold.op, 1};
  const std::byte* source = share_.received;
  for (int step = 0; step < hosts_ - 1; ++step) {
    for (std::size_t i = 0; i < segments_; ++i) {
      const Range incoming = segment_of(host_ - step - 1, i);
      auto arrived = stream_.received(++arrived_);
      co_await until(arrived);
      const std::byte* const sources[] = {source, partial_sum(incoming)};
      fold(partial, partial_sum(incoming), sources, incoming.count());
      source += incoming.count() * share_.wire();
      if (step < hosts_ - 2) {
        send_partial(incoming);
      } else {
        finish_segment(incoming);
        send_finished(incoming);
      }
    }
  }
  // What comes now is finished: it is passed on H-2 times.
  for (int step = 0; step < hosts_ - 1; ++step) {
    for (std::size_t i = 0; i < segments_; ++i) {
      const Range incoming = segment_of(host_ - step, i);
      stream_.receive(host_ - 1, {share_.result + incoming.begin * share_.element(),
                                  incoming.count() * share_.element()});
    }
  }
  for (int step = 0; step < hosts_ - 2; ++step) {
    for (std::size_t i = 0; i < segments_; ++i) {
      auto arrived = stream_.received(++arrived_);
      co_await until(arrived);
      send_finished(segment_of(host_ - step, i));
    }
  }
}

}  // namespace pycomm
