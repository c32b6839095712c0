#pragma once

#include "collectives/lane_exchange.h"
#include "collectives/segments.h"

namespace pycomm {

/// All-reduce between H hosts around a ring. Host h always sends to h+1 and receives from h-1; the
/// share is cut into H chunks; chunk and host indices are modulo H:
///
///   reduce-scatter   step s = 0..H-2   send chunk h-s,    receive chunk h-s-1 and fold it in
///                                      (host h now owns the finished chunk h+1)
///   all-gather       step s = 0..H-2   send chunk h+1-s,  receive chunk h-s
///
/// A chunk travels as segments of at most kSegmentBytes, each of which is passed on in the next
/// step as soon as it is there: the wire does not rest between steps.
///
/// Every host talks to two neighbours only, whatever H. What it gives up: chunk c is folded in the
/// rotated order c, c+1, ..., so results differ in the last bits from the canonical order (all
/// ranks still agree, run after run). Partial sums travel in the accumulator type.
///
/// Cost, for n bytes, alpha s per message, beta s per byte sent, gamma s per byte folded:
///
///   T = 2(H-1) alpha + 2 (H-1)/H n beta + (H-1)/H n gamma           (one segment per chunk)
///
/// Source: Patarasuk & Yuan, J. Parallel Distrib. Comput. 69 (2009). Notation: Thakur, Rabenseifner
/// & Gropp, Int. J. High Perform. Comput. Appl. 19 (2005).
///
/// `share.fold.source_dtype` must be an accumulator type.
class RingExchange : public LaneExchange {
 public:
  RingExchange(LaneStream& stream, const Share& share);

  void begin() override;
  Task<> finish() override;

 private:
  Range segment_of(int chunk, std::size_t index) const;
  std::byte* partial_sum(const Range& range) const {
    return share_.host_sum + range.begin * share_.wire();
  }
  void send_partial(const Range& segment);
  void send_finished(const Range& segment);
  void finish_segment(const Range& segment) const;

  LaneStream& stream_;
  const Share share_;
  const int host_;
  const int hosts_;
  const std::size_t segments_;
  LaneStream::Ticket arrived_ = 0;  // receives that were over when this exchange began
};

}  // namespace pycomm
