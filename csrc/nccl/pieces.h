#pragma once

#include <cstddef>
#include <vector>

#include "core/operation.h"

namespace pycomm::nccl {

/// How a collective's tensors on GPUs are cut into pieces that go through a slot of host memory,
/// each a collective of its own. Piece i is elements [i c, (i + 1) c) of every block of the
/// tensors, where c is such that the piece fits the slot. An all-gather of 3 ranks, c = 4, seen
/// from rank 1, which brings 6 elements:
///
///   tensor   input  |012345|        output  |012|012345|0123456|
///   piece 0  down    0123      collective    012 0123   0123       up
///   piece 1  down        45    collective           45      456    up
///
/// In the slot the blocks of a piece lie end to end, and what this rank brings lies in its own
/// place in what it receives, or the reverse, where the collective allows that.
///
/// Pure: no memory is touched.
class Pieces {
 public:
  /// @param slot_bytes  the same on all ranks; room for an element of each block.
  Pieces(const Operation& operation, int rank, int size, std::size_t slot_bytes);

  /// What a slot has to have for any collective of `size` ranks.
  static constexpr std::size_t least_slot_bytes(int size) {
    return 2 * static_cast<std::size_t>(size) * 16;  // kAllToAll of complex128
  }

  /// Elements of the longest block that this rank has. The largest of all ranks' gives count().
  std::size_t longest() const;
  /// How many pieces there are.
  std::size_t count(std::size_t longest_of_all) const {
    return (longest_of_all + elements_ - 1) / elements_;
  }

  struct Copy {
    const std::byte* from;
    std::byte* to;
    std::size_t bytes;
  };
  /// From the tensors into the slot, before the collective.
  std::vector<Copy> down(std::size_t piece, std::byte* slot) const;
  /// From the slot to the tensors, after it.
  std::vector<Copy> up(std::size_t piece, std::byte* slot) const;

  /// The collective on what lies in the slot.
  Operation part(std::size_t piece, std::byte* slot) const;

 private:
  using Blocks = std::vector<std::size_t>;  // elements of each

  /// Of a block.
  std::size_t begin(std::size_t piece, std::size_t block) const;
  std::size_t elements(std::size_t piece, std::size_t block) const;
  /// Of all blocks before number `end`.
  std::size_t elements_before(const Blocks& blocks, std::size_t piece, std::size_t end) const;
  /// Where they begin in the slot, in bytes.
  std::size_t input_at(std::size_t piece) const;
  std::size_t output_at(std::size_t piece) const;

  const Operation& operation_;
  const std::size_t rank_;
  const std::size_t element_bytes_;
  Blocks inputs_;         // empty: this rank brings nothing
  Blocks outputs_;        // empty: it receives nothing
  std::size_t elements_;  // of a block in a piece
};

}  // namespace pycomm::nccl
