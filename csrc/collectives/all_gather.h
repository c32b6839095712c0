#pragma once

#include "collectives/context.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Every rank ends with all ranks' elements, one after the other in rank order: `count` of each, or
/// `output_counts[r]` of rank r. Elements are only moved: any dtype.
///
/// Inside one host a small input travels with the announcement, and inputs that all lie in arenas
/// are read there, with one meeting. Otherwise pieces go through two alternating staging slots a
/// rank, with one meeting for each. Between hosts each piece goes to one rank of every other host,
/// its keeper there (the one at the sender's local rank, modulo the number of ranks of that host):
///
///   every rank   copy my piece to my slot
///   round s      send it to its keeper on host h+s, receive what I keep of host h-s
///                (s = 1..H-1, modulo H; paced: both are waited for)                    | meet
///   every rank   copy all pieces out, the own host's from their senders, others from their keepers
///
/// Cost for n bytes a rank, p ranks on H hosts: each rank sends H-1 messages of n bytes,
/// (H-1) (alpha + n beta); it copies n in and p n out.
Task<> all_gather(Context& context, const Operation& operation);

}  // namespace pycomm
