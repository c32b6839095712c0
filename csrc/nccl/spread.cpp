#include "nccl/spread.h"

namespace pycomm::nccl {

Task<> spread(Carrier& carrier, const Placement& placement, int rank,
              std::vector<std::span<std::byte>> blocks) {
  const int size = static_cast<int>(blocks.size());
  const int host = placement.host_of[static_cast<std::size_t>(rank)];
  const auto block = [&](int owner) { return blocks[static_cast<std::size_t>(owner)]; };
  const auto send = [&](Exchange& exchange, int peer, int owner) {
    exchange.send(peer, block(owner).data(), block(owner).size());
  };
  const auto receive = [&](Exchange& exchange, int peer, int owner) {
    exchange.receive(peer, block(owner).data(), block(owner).size());
  };
  std::vector<int> brought;  // owners of the blocks that are this rank's to pass on
  for (int owner = 0; owner < size; ++owner) {
    if (placement.folder(host, owner) == rank) brought.push_back(owner);
  }

  if (placement.host_count() > 1) {
    Exchange between_hosts;
    for (int other = 0; other < placement.host_count(); ++other) {
      if (other != host) send(between_hosts, placement.folder(other, rank), rank);
    }
    for (const int owner : brought) {
      if (owner != rank) receive(between_hosts, owner, owner);
    }
    co_await carrier.carry(between_hosts);
  }

  Exchange inside_host;
  for (const int peer : placement.hosts[static_cast<std::size_t>(host)]) {
    if (peer == rank) continue;
    for (const int owner : brought) send(inside_host, peer, owner);
  }
  for (int owner = 0; owner < size; ++owner) {
    const int folder = placement.folder(host, owner);
    if (folder != rank) receive(inside_host, folder, owner);
  }
  co_await carrier.carry(inside_host);
}

}  // namespace pycomm::nccl
