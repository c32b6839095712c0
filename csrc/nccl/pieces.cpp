#include "nccl/pieces.h"

#include <algorithm>

namespace pycomm::nccl {
namespace {

/// Blocks of a tensor that has one for each rank.
std::vector<std::size_t> by_rank(const std::vector<std::size_t>& counts, std::size_t count,
                                 int size) {
  return counts.empty() ? std::vector<std::size_t>(static_cast<std::size_t>(size), count) : counts;
}

std::vector<std::size_t> inputs_of(const Operation& operation, int rank, int size) {
  const bool is_root = rank == operation.root;
  switch (operation.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
    case Kind::kAllGather:
    case Kind::kGather:
      return {operation.count};
    case Kind::kBroadcast:
      if (is_root) return {operation.count};
      return {};
    case Kind::kScatter:
      if (is_root) return by_rank({}, operation.count, size);
      return {};
    case Kind::kReduceScatter:
      return by_rank({}, operation.count, size);
    case Kind::kAllToAll:
      return by_rank(operation.input_counts, operation.count, size);
    default:
      return {};
  }
}

std::vector<std::size_t> outputs_of(const Operation& operation, int rank, int size) {
  const bool is_root = rank == operation.root;
  switch (operation.kind) {
    case Kind::kAllReduce:
    case Kind::kScatter:
    case Kind::kReduceScatter:
      return {operation.count};
    case Kind::kBroadcast:
      if (is_root && operation.input == operation.output) return {};
      return {operation.count};
    case Kind::kReduce:
      if (is_root) return {operation.count};
      return {};
    case Kind::kGather:
      if (!is_root) return {};
      [[fallthrough]];
    case Kind::kAllGather:
    case Kind::kAllToAll:
      return by_rank(operation.output_counts, operation.count, size);
    default:
      return {};
  }
}

/// How many blocks of a piece a slot has to hold, on any rank.
std::size_t blocks_in_slot(Kind kind, int size) {
  switch (kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
    case Kind::kBroadcast:
      return 1;
    case Kind::kAllToAll:
      return 2 * static_cast<std::size_t>(size);
    default:
      return static_cast<std::size_t>(size);
  }
}

/// Appends a copy, or makes the last one longer if it ends where this one begins.
void append(std::vector<Pieces::Copy>& copies, const Pieces::Copy& copy) {
  if (copy.bytes == 0) return;
  if (!copies.empty()) {
    Pieces::Copy& last = copies.back();
    if (last.from + last.bytes == copy.from && last.to + last.bytes == copy.to) {
      last.bytes += copy.bytes;
      return;
    }
  }
  copies.push_back(copy);
}

}  // namespace

Pieces::Pieces(const Operation& operation, int rank, int size, std::size_t slot_bytes)
    : operation_(operation),
      rank_(static_cast<std::size_t>(rank)),
      element_bytes_(size_of(operation.dtype)),
      inputs_(inputs_of(operation, rank, size)),
      outputs_(outputs_of(operation, rank, size)),
      elements_(slot_bytes / (element_bytes_ * blocks_in_slot(operation.kind, size))) {}

std::size_t Pieces::longest() const {
  std::size_t longest = 0;
  for (const std::size_t count : inputs_) longest = std::max(longest, count);
  for (const std::size_t count : outputs_) longest = std::max(longest, count);
  return longest;
}

std::size_t Pieces::begin(std::size_t piece, std::size_t block) const {
  return std::min(block, piece * elements_);
}

std::size_t Pieces::elements(std::size_t piece, std::size_t block) const {
  return begin(piece + 1, block) - begin(piece, block);
}

std::size_t Pieces::elements_before(const Blocks& blocks, std::size_t piece,
                                    std::size_t end) const {
  std::size_t sum = 0;
  for (std::size_t i = 0; i < std::min(end, blocks.size()); ++i) sum += elements(piece, blocks[i]);
  return sum;
}

std::size_t Pieces::input_at(std::size_t piece) const {
  const bool gathers = operation_.kind == Kind::kAllGather || operation_.kind == Kind::kGather;
  return gathers ? elements_before(outputs_, piece, rank_) * element_bytes_ : 0;
}

std::size_t Pieces::output_at(std::size_t piece) const {
  switch (operation_.kind) {
    case Kind::kScatter:
    case Kind::kReduceScatter:
      return elements_before(inputs_, piece, rank_) * element_bytes_;
    case Kind::kAllToAll:
      return elements_before(inputs_, piece, inputs_.size()) * element_bytes_;
    default:
      return 0;
  }
}

std::vector<Pieces::Copy> Pieces::down(std::size_t piece, std::byte* slot) const {
  std::vector<Copy> copies;
  const std::byte* block_at = operation_.input;
  std::byte* to = slot + input_at(piece);
  for (const std::size_t block : inputs_) {
    const std::size_t bytes = elements(piece, block) * element_bytes_;
    append(copies, {block_at + begin(piece, block) * element_bytes_, to, bytes});
    block_at += block * element_bytes_;
    to += bytes;
  }
  return copies;
}

std::vector<Pieces::Copy> Pieces::up(std::size_t piece, std::byte* slot) const {
  std::vector<Copy> copies;
  std::byte* block_at = operation_.output;
  const std::byte* from = slot + output_at(piece);
  for (const std::size_t block : outputs_) {
    const std::size_t bytes = elements(piece, block) * element_bytes_;
    append(copies, {from, block_at + begin(piece, block) * element_bytes_, bytes});
    block_at += block * element_bytes_;
    from += bytes;
  }
  return copies;
}

Operation Pieces::part(std::size_t piece, std::byte* slot) const {
  Operation part;
  part.kind = operation_.kind;
  part.dtype = operation_.dtype;
  part.op = operation_.op;
  if (operation_.algorithm == Algorithm::kGpuExactOrder) part.algorithm = Algorithm::kExactOrder;
  part.root = operation_.root;
  part.divisor = operation_.divisor;
  part.prescale = operation_.prescale;
  part.postscale = operation_.postscale;
  part.count = elements(piece, operation_.count);
  part.input = slot + input_at(piece);
  part.output = slot + output_at(piece);
  part.name = operation_.name;
  for (const std::size_t block : operation_.input_counts) {
    part.input_counts.push_back(elements(piece, block));
  }
  for (const std::size_t block : operation_.output_counts) {
    part.output_counts.push_back(elements(piece, block));
  }
  return part;
}

}  // namespace pycomm::nccl
