#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// All-reduce over H hosts with several ranks each. S lanes (S = the smallest number of ranks on
/// any host) each carry one share of the buffer between the hosts:
///
///   every rank       show the input (in its arena, or copied to staging)          | meet
///   lane j's ranks   fold share j of the host's ranks, in rank order
///                    all-reduce share j with lane j of the other hosts            | meet
///   every rank       copy all shares of the result out
///
/// Buffers larger than the staging regions go through piece by piece. 16-bit floats are widened to
/// float32 by the host's fold and rounded once, at the very end; only where every host has a single
/// rank does the 16-bit input itself travel. One host is not a case of this (all_reduce_window).
///
/// Cost for n bytes: that of the inter-host algorithm for n/S bytes, plus inside the host (p reads
/// of n/S, n written) a rank and two meetings for each piece.
Task<> all_reduce_hierarchical(Context& context, const Operation& operation);

}  // namespace pycomm
