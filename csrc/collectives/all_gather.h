#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Every rank ends with all ranks' `count` elements, one after the other in rank order, in
/// `output`. Elements are only moved: any dtype.
///
/// Inside a host a small input travels with the announcement; a larger one piece by piece through
/// two staging slots a rank. Between hosts the first rank of each host sends its host's pieces to
/// the first rank of every other, in rounds as in all_reduce_direct.
///
/// Cost for n bytes a rank and p ranks on H hosts: p n copied by each rank inside the host, and
/// (p - p/H) n received by each host in p - p/H messages.
Task<> all_gather(Context& context, const Operation& operation);

}  // namespace pycomm
