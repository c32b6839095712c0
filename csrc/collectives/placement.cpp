#include "collectives/placement.h"

#include <algorithm>

namespace pycomm {

Placement Placement::of(const std::vector<std::string>& keys) {
  Placement placement;
  std::vector<std::string> seen;  // keys in order of their lowest rank
  for (std::size_t rank = 0; rank < keys.size(); ++rank) {
    const auto known = std::find(seen.begin(), seen.end(), keys[rank]);
    const auto host = static_cast<std::size_t>(known - seen.begin());
    if (known == seen.end()) {
      seen.push_back(keys[rank]);
      placement.hosts.emplace_back();
    }
    placement.host_of.push_back(static_cast<int>(host));
    placement.local_rank_of.push_back(static_cast<int>(placement.hosts[host].size()));
    placement.hosts[host].push_back(static_cast<int>(rank));
  }
  return placement;
}

int Placement::lanes() const {
  std::size_t fewest = hosts.front().size();
  for (const auto& ranks : hosts) fewest = std::min(fewest, ranks.size());
  return static_cast<int>(fewest);
}

int Placement::most_ranks() const {
  std::size_t most = 0;
  for (const auto& ranks : hosts) most = std::max(most, ranks.size());
  return static_cast<int>(most);
}

int Placement::folder(int host, int owner) const {
  const auto& ranks = hosts[static_cast<std::size_t>(host)];
  const auto position = static_cast<std::size_t>(local_rank_of[static_cast<std::size_t>(owner)]);
  return ranks[position % ranks.size()];
}

}  // namespace pycomm
