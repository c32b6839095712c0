#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#include "collectives/context.h"
#include "collectives/fold_specs.h"
#include "collectives/partition.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm {

/// Folds blocks of all ranks' inputs to the rank that owns each, piece by piece, in the canonical
/// order: what a reduce-scatter does, and a reduce between hosts as its first half.
///
///   every rank        copy to my slot what others fold of my input                        | meet
///   between hosts     rank q of host h folds its host's part of the blocks owned by the ranks
///                     q, q+L, q+2L, ... of host h+s (L ranks on h), and sends each to its owner;
///                     it receives the part of host h-s of its own block     (s = 1..H-1, modulo H)
///   owner             fold my block: the ranks' inputs, or the hosts' sums in host order
///
/// Two slots alternate, so there is one meeting for each piece: a fast rank fills one while a slow
/// one still folds the other. Where all inputs of the host lie in arenas they are read there, and
/// nothing is copied in.
///
/// Cost: see reduce_scatter.
class BlockFold {
 public:
  /// To be made once the operation is open.
  BlockFold(Context& context, const Operation& operation);

  /// Elements of a block that fit one run; the same on every rank.
  std::size_t piece_count() const { return piece_count_; }
  /// Whether peers read inputs where they lie; the ranks of a host must then meet after the last
  /// run.
  bool reads_arenas() const { return reads_arenas_; }
  /// Room for three pieces in the staging of every rank of this host, which no run touches;
  /// between hosts only.
  std::byte* spare(int peer) const { return region(peer, 3) + piece_count_ * wire_; }

  /// @param block_of     what of the input each rank owns, in elements; at most piece_count() of
  ///                     them, and the same on every rank.
  /// @param destination  of what this rank owns; may be that part of the input.
  Task<> run(const std::function<Range(int)>& block_of, std::byte* destination);

 private:
  std::byte* region(int peer, std::size_t index) const;
  /// The rank of this host that folds this host's part of `owner`'s block.
  int folder_of(int owner) const;
  std::byte* place(int peer, int owner) const;
  void copy_in(const std::function<Range(int)>& block_of) const;
  /// Fold this host's inputs for `owner`.
  void fold_host(const FoldSpec& spec, int owner, const Range& block, std::byte* destination);
  Task<> fold_between_hosts(const std::function<Range(int)>& block_of, std::byte* destination);

  Context& context_;
  const Operation& operation_;
  const FoldSpecs specs_;
  const std::size_t element_;
  const std::size_t input_bytes_;  // of every rank
  const std::size_t wire_;
  const std::size_t slot_bytes_;
  const std::size_t piece_count_;
  bool reads_arenas_ = true;
  std::size_t runs_ = 0;
  std::vector<const std::byte*> sources_;
};

}  // namespace pycomm
