#pragma once

#include <vector>

#include "collectives/lane_exchange.h"
#include "collectives/segments.h"

namespace pycomm {

/// All-reduce between H hosts by direct exchange: the share is cut into H chunks, host h receives
/// chunk h of everybody, folds it in host order, and sends the result to everybody.
///
/// Each of the two phases takes H-1 paced rounds: in round s = 1..H-1 host h sends to h+s and
/// receives from h-s (modulo H), so that a receiver has one sender at a time:
///
///   reduce-scatter   round s   send chunk h+s of mine     receive chunk h of host h-s
///                    (fold chunk h of hosts 0..H-1 in order, divide, round)
///   all-gather       round s   send finished chunk h      receive finished chunk h-s
///
/// A chunk travels as k segments of at most kSegmentBytes; a round begins when all but the last two
/// of the one before have arrived. That keeps hosts in step: a receiver that invited each sender by
/// a message of its own was a sixth slower (benchmarks/README.md). Once the last round's first
/// segment is there, the finished first segment can leave, so the wire does not rest between the
/// phases.
///
/// Cost, for n bytes, alpha s per message, beta s per byte sent, gamma s per byte folded:
///
///   T = 2(H-1) alpha + 2 (H-1)/H n beta + n gamma                   (one segment per chunk)
///
/// The bytes of the ring; the fold keeps the canonical order, which the ring cannot.
class DirectExchange : public LaneExchange {
 public:
  DirectExchange(LaneStream& stream, const Share& share);

  void begin() override;
  Task<> finish() override;

 private:
  Range chunk(int host) const;
  /// The receive after which a round begins whose own receives are queued next.
  LaneStream::Ticket turn() const;

  LaneStream& stream_;
  const Share share_;
  const int host_;
  const int hosts_;
  const std::size_t segments_;
  const Range mine_;
  std::vector<const std::byte*> sources_;  // of chunk `mine_`, by host
  LaneStream::Ticket before_last_round_ = 0;
};

}  // namespace pycomm
