#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "collectives/placement.h"
#include "core/operation.h"
#include "core/task.h"
#include "nccl/exchange.h"

namespace pycomm::nccl {

/// Whether `operation` is for reduce_in_exact_order(): a reduction of floats or complex numbers.
/// What integers and truth values come to is the same in every order, so NCCL's own will do.
bool needs_exact_order(const Operation& operation);

/// Why these ranks cannot do it, which all of them find alike; empty: they can.
std::string problem_of_exact_order(const Operation& operation, const Placement& placement,
                                   std::size_t scratch_bytes);

/// All-reduce, reduce or reduce-scatter on GPUs with the bits of the host's plane (FoldSpecs): the
/// ranks of a host are folded in rank order, then the hosts' sums in host order; 16-bit floats in a
/// float32 accumulator, rounded once. The carrier only moves bytes; what adds is our fold. The bits
/// do not depend on the message size, on how a buffer is cut, or on what NCCL would have chosen.
///
/// Each rank owns a block of the result: an equal part of an all-reduce's or a reduce's, its own of
/// a reduce-scatter's. With p ranks on H hosts, on each host one rank folds what its ranks bring to
/// an owner's block (Placement::folder), on its own the owner. A piece of every block at a time:
///
///   inside a host   each rank sends its part of block b to the folder of b, for all b
///                   fold in rank order; with one host this is the result
///   between hosts   the folder sends its host's sum, in float32, to b's owner
///                   fold in host order, round
///   all_reduce      spread() the finished blocks
///   reduce          the owner sends the finished block to the root
///
/// Each line of messages is one exchange. All runs in the order of the device's stream; whether the
/// host waits for the GPU between them is the carrier's affair.
///
/// Cost for n bytes of an all-reduce of 16-bit floats, p ranks on H hosts of p/H: a GPU sends
/// 2 (p/H-1)/(p/H) n inside its host, and a host (H-1)/H (2n + n) to others (sums are float32), the
/// least that sums in float32 can; it reads n elements for the first fold and H n/p sums for the
/// second. NCCL's own sends (H-1)/H 2n between hosts, rounded at every hop. Where every host has
/// one rank, its input travels as it is. Scratch: as much as is given, however long the buffer.
///
/// @param operation  a reduction of floats or complex numbers, without a problem_of_exact_order().
/// @param scratch  of the GPU; as long on all ranks.
/// @throws CommError  the carrier, or a kernel's launch, has failed.
Task<> reduce_in_exact_order(Carrier& carrier, const Operation& operation,
                             const Placement& placement, int rank, std::span<std::byte> scratch);

}  // namespace pycomm::nccl
