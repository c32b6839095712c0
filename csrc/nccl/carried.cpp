#include "nccl/carried.h"

#include <utility>
#include <vector>

#include "collectives/partition.h"
#include "nccl/exact_order.h"
#include "nccl/spread.h"

namespace pycomm::nccl {
namespace {

using Blocks = std::vector<std::span<std::byte>>;  // by owner

/// Parts of a broadcast begin on multiples of it.
constexpr std::size_t kAlignment = 16;

Blocks blocks_of_all_gather(const Operation& operation, const Placement& placement) {
  Blocks blocks;
  std::byte* at = operation.output;
  for (std::size_t owner = 0; owner < placement.host_of.size(); ++owner) {
    const std::size_t count =
        operation.output_counts.empty() ? operation.count : operation.output_counts[owner];
    blocks.emplace_back(at, count * size_of(operation.dtype));
    at += blocks.back().size();
  }
  return blocks;
}

/// One for each rank of the root's host.
Blocks blocks_of_broadcast(const Operation& operation, const Placement& placement) {
  const int root_host = placement.host_of[static_cast<std::size_t>(operation.root)];
  const auto& owners = placement.hosts[static_cast<std::size_t>(root_host)];
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  Blocks blocks(placement.host_of.size());
  for (std::size_t i = 0; i < owners.size(); ++i) {
    const Range part =
        partition(bytes, static_cast<int>(owners.size()), static_cast<int>(i), kAlignment);
    blocks[static_cast<std::size_t>(owners[i])] = {operation.output + part.begin, part.count()};
  }
  return blocks;
}

Exchange from_root(const Blocks& blocks, int root, int rank) {
  Exchange exchange;
  for (int owner = 0; owner < static_cast<int>(blocks.size()); ++owner) {
    if (owner == root) continue;
    const auto& block = blocks[static_cast<std::size_t>(owner)];
    if (rank == root) exchange.send(owner, block.data(), block.size());
    if (rank == owner) exchange.receive(root, block.data(), block.size());
  }
  return exchange;
}

}  // namespace

bool can_be_carried(const Operation& operation, const Placement& placement,
                    std::size_t scratch_bytes) {
  if (!reduces(operation.kind)) return true;
  return is_scalable(operation.dtype) &&
         problem_of_exact_order(operation, placement, scratch_bytes).empty();
}

Task<> run_carried(Carrier& carrier, const Operation& operation, const Placement& placement,
                   int rank, std::span<std::byte> scratch) {
  switch (operation.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
    case Kind::kReduceScatter:
      co_await reduce_in_exact_order(carrier, operation, placement, rank, scratch);
      break;
    case Kind::kAllGather:
      co_await spread(carrier, placement, rank, blocks_of_all_gather(operation, placement));
      break;
    case Kind::kBroadcast: {
      Blocks blocks = blocks_of_broadcast(operation, placement);
      const Exchange parts = from_root(blocks, operation.root, rank);
      co_await carrier.carry(parts);
      co_await spread(carrier, placement, rank, std::move(blocks));
      break;
    }
    default: {
      const Exchange moves =
          exchange_of(operation, rank, static_cast<int>(placement.host_of.size()));
      co_await carrier.carry(moves);
    }
  }
}

}  // namespace pycomm::nccl
