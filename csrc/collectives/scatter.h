#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Rank r ends with block r of the root's input, `count` elements. Elements are only moved: any
/// dtype.
///
/// Inside the root's host a small input travels whole with the announcement, one in the root's
/// arena is read where it lies, another goes through staging (see exchange). Ranks of other hosts
/// get their block from the root, one after the other:
///
///   round t = 1..p-1   the root sends to the rank t positions behind it
///
/// Cost for n bytes a rank, p ranks, q of them on the root's host: (p-q) alpha + (p-q) n beta at
/// the root, one message of n bytes to every other rank.
Task<> scatter(Context& context, const Operation& operation);

}  // namespace pycomm
