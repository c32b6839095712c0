#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// All-reduce over H hosts. S lanes (S = the smallest number of ranks on any host) each carry one
/// share of the buffer between the hosts. It goes in pieces (PiecePlan); a piece i is
///
///   every rank       shown: the input in its arena, or copied to staging
///   lane j's ranks   folded, share j of the host's ranks, in rank order
///                    exchanged, share j with lane j of the other hosts
///   every rank       copied out, all shares of the result
///
/// and the wire never rests between pieces. Each rank, from one meeting of its host to the next:
///
///   meeting i-1 | finish exchange i-1, fold i, begin exchange i, copy out i-2,
///               |   wait for the last messages of exchange i-1, copy in i+1
///   meeting i   | finish exchange i, ...
///
/// Meeting i is over when every rank has come with exchange i-1 over, i+1 copied in and i-2 copied
/// out, and only then is something of result i written: that is why two halves of the staging are
/// enough. While a rank waits for it, the messages of its lane move on.
///
/// Where a host has a single rank, whose buffer is in its arena and nothing widens, messages leave
/// from it and arrive in it: no copy is made.
///
/// 16-bit floats are widened to float32 by the host's fold and rounded once, at the very end; only
/// where every host has a single rank does the 16-bit input itself travel. One host is not a case
/// of this (all_reduce_window).
///
/// Cost for n bytes: that of the exchange for n/S bytes in each lane; inside the host (p reads of
/// n/S, n written) a rank and one meeting for each piece, hidden behind the wire.
///
/// @param algorithm  not kAuto.
Task<> all_reduce_hierarchical(Context& context, const Operation& operation, Algorithm algorithm);

}  // namespace pycomm
