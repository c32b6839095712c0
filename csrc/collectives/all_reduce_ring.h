#pragma once

#include "collectives/all_reduce_direct.h"

namespace pycomm {

/// All-reduce between H hosts around a ring. Host h always sends to h+1 and receives from h-1; the
/// share is cut into H chunks; chunk and host indices are modulo H:
///
///   reduce-scatter   step s = 0..H-2   send chunk h-s,    receive chunk h-s-1 and fold it in
///                                      (host h now owns the finished chunk h+1)
///   all-gather       step s = 0..H-2   send chunk h+1-s,  receive chunk h-s
///
/// A chunk travels as segments of at most `share.segment_bytes`, two receives in flight, so that
/// folding one overlaps receiving the next.
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
/// @param share  `fold.source_dtype` must be an accumulator type.
Task<> all_reduce_ring(const Lane& lane, const Share& share);

}  // namespace pycomm
