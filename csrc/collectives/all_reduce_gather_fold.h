#pragma once

#include "collectives/lane_exchange.h"

namespace pycomm {

/// All-reduce between H hosts by gather and fold: every host collects all hosts' sums and folds
/// them itself, in host order. In round k host h sends what it has, the sums of hosts h, h-1, ...,
/// to host h+2^k (modulo H), and receives as much from h-2^k:
///
///   round k = 0..ceil(log2 H)-1   send min(2^k, H-2^k) sums    receive those of h-2^k, h-2^k-1,
///   ...
///
/// Cost, for n bytes, alpha s per message, beta s per byte sent, gamma s per byte folded:
///
///   T = ceil(log2 H) alpha + (H-1) n beta + H n gamma
///
/// The fewest messages, for H/2 times the bytes of direct exchange; the result is the same, bit for
/// bit. Small operations ride on the messages by which they are agreed upon (open_operation), and
/// so cost not a single message more.
///
/// Source: Bruck, Ho, Kipnis, Upfal & Weathersby, IEEE Trans. Parallel Distrib. Syst. 8 (1997).
class GatherFoldExchange : public LaneExchange {
 public:
  GatherFoldExchange(LaneStream& stream, const Share& share) : stream_(stream), share_(share) {}

  void begin() override;
  Task<> finish() override;

 private:
  LaneStream& stream_;
  const Share share_;
};

/// Fold the sums of hosts `host`, host-1, ... (modulo `hosts`), which lie end to end in `gathered`
/// as they were received, in host order.
void fold_gathered(const FoldSpec& spec, std::byte* result, const std::byte* gathered,
                   std::size_t count, int host, int hosts);

}  // namespace pycomm
