#pragma once

#include <string>
#include <vector>

namespace pycomm {

/// Which rank of a group runs on which host. Hosts are ordered by their lowest rank, the ranks of a
/// host by rank: the canonical order in which every reduction folds.
struct Placement {
  std::vector<std::vector<int>> hosts;  // group ranks of each host
  std::vector<int> host_of;             // by group rank
  std::vector<int> local_rank_of;       // position of a group rank within its host

  int host_count() const { return static_cast<int>(hosts.size()); }
  /// Ranks of each host that talk to the other hosts: the smallest number of ranks on any host.
  int lanes() const;
  /// The largest number of ranks on any host.
  int most_ranks() const;
  /// Where every rank is to end with a block of the result: the rank of `host` that folds what its
  /// ranks bring to the block of `owner`. That is the owner itself on its own host.
  int folder(int host, int owner) const;

  /// @param keys  for each group rank, what names its host; equal keys are one host.
  static Placement of(const std::vector<std::string>& keys);
};

}  // namespace pycomm
