#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "collectives/context.h"
#include "core/task.h"

namespace pycomm {

/// What one rank moves: a block to and a block from each rank of the group, itself among them.
/// Empty blocks move nothing. `outgoing[d]` of rank s is as long as `incoming[s]` of rank d.
struct Blocks {
  explicit Blocks(const Context& context)
      : outgoing(static_cast<std::size_t>(context.size())),
        incoming(static_cast<std::size_t>(context.size())) {}

  std::vector<std::span<const std::byte>> outgoing;
  std::vector<std::span<std::byte>> incoming;
  /// Bytes of the longest block between two ranks of this host; the same on all of them.
  std::size_t longest_local = 0;
  /// To how many ranks of this host one of them may send: 1, or all of them.
  int fan_out = 1;
  /// Where `incoming[s]` lies in the arena of each rank s of this host, if the blocks of this host
  /// are to be read there; the same choice on all its ranks. Empty: they go through staging.
  std::vector<const std::byte*> readable;
};

/// Move every block to its receiver.
///
/// Inside a host, blocks that lie in arenas are read there, with one meeting at the end; others go
/// through two alternating staging slots a rank, cut into one place for each receiver:
///
///   copy piece 0 in | meet | copy piece 0 out, copy piece 1 in | meet | copy piece 1 out, ...
///
/// Between hosts, p-1 pairwise rounds over the ranks in canonical order (host by host): in round t
/// the rank at position q sends to q+t and receives from q-t (modulo p), unless that one is on its
/// own host, so that a receiver has one sender at a time.
///
/// Cost, for a rank that sends the blocks of m ranks of other hosts, b bytes in all:
/// m alpha + b beta (k alpha a block that is cut into k pieces); two copies of each byte through
/// staging inside a host, one from an arena.
///
/// Source of the rounds: the pairwise exchange in Thakur, Rabenseifner & Gropp, Int. J. High
/// Perform. Comput. Appl. 19 (2005).
Task<> exchange(Context& context, const Blocks& blocks);

}  // namespace pycomm
