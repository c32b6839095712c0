#pragma once

#include "collectives/context.h"
#include "core/task.h"
#include "kernels/fold.h"

namespace pycomm {

/// One lane's share of an all-reduce between hosts.
struct Share {
  /// This host's sum, `count` elements of `fold.source_dtype`; overwritten by the ring.
  std::byte* host_sum;
  /// The result, `count` elements of `fold.destination_dtype`.
  std::byte* result;
  /// Room for what is received: at least as many bytes as `host_sum` plus one element a host.
  std::byte* received;
  std::size_t count;
  /// The ring receives by segments of this many bytes, two of which fit `received`.
  std::size_t segment_bytes;
  FoldSpec fold;
};

/// All-reduce between H hosts by direct exchange: the share is cut into H chunks, host h receives
/// chunk h of everybody, folds it in host order, and sends the result to everybody.
///
/// Each of the two phases takes H-1 paced rounds: in round s = 1..H-1 host h sends to h+s and
/// receives from h-s (modulo H) and waits for both, so that a receiver has one sender at a time.
///
///   reduce-scatter   round s   send chunk h+s of mine     receive chunk h of host h-s
///                    (fold chunk h of hosts 0..H-1 in order, divide, round)
///   all-gather       round s   send finished chunk h      receive finished chunk h-s
///
/// Cost, for n bytes, alpha s per message, beta s per byte sent, gamma s per byte folded:
///
///   T = 2(H-1) alpha + 2 (H-1)/H n beta + n gamma
///
/// The bytes of the ring; the fold keeps the canonical order, which the ring cannot.
Task<> all_reduce_direct(const Lane& lane, const Share& share);

}  // namespace pycomm
