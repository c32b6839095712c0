#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// The root ends with the sum (or other op) of all ranks' `count` elements: the bits of an
/// all_reduce.
///
/// Inside one host a small input travels with the announcement, and the root folds all of them;
/// larger ones are folded like an all-reduce of which the root alone copies the result out (see
/// all_reduce_window). Between hosts, piece by piece:
///
///   every rank r   owns part r of the piece and folds it (see BlockFold)
///   other hosts    send their finished parts to the root, which receives them in rank order
///   root's host    | meet | the root copies its host's parts out
///
/// Cost for n bytes, p ranks on H hosts of p/H each:
///
///   bytes that reach the root's host     2 (H-1)/H n   (H-1)/H n of sums, as much of finished
///   parts bytes that leave every other host    n             (H-1)/H n of sums, 1/H n of finished
///   parts T = 2(H-1) p/H alpha + 2 (H-1)/H n beta + n gamma
///
/// Sending all inputs to the root's host would take (H-1) n there.
Task<> reduce(Context& context, const Operation& operation);

}  // namespace pycomm
