#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Every rank ends with the root's `count` elements. Elements are only moved: any dtype.
///
/// Inside the root's host a small payload travels with the announcement, and a buffer in the root's
/// arena is read where it lies. Otherwise pieces go through two staging slots of the host's leader:
/// the root itself on its host, the first rank on the others, which are reached over a binomial
/// tree of hosts.
///
/// Cost for n bytes, H hosts, alpha s per message, beta s per byte sent: ceil(log2 H) (alpha + n
/// beta) and one or two copies inside the host.
///
/// Source of the tree: Thakur, Rabenseifner & Gropp, Int. J. High Perform. Comput. Appl. 19 (2005).
Task<> broadcast(Context& context, const Operation& operation);

}  // namespace pycomm
