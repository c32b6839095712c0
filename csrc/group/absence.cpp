#include "group/absence.h"

#include <algorithm>
#include <cstdio>

#include "core/rank_list.h"
#include "transport/whereabouts.h"

namespace pycomm {
namespace {

/// So many ranks are described, and asked one after the other; of more there is only the number.
constexpr std::size_t kMostDescribed = 4;

/// Of all stacks together: what they leave of a notice is for the rest of the error.
constexpr std::size_t kMostStackBytes = 6000;

std::string rank_name(const Window& window, int peer) {
  return "rank " + std::to_string(window.group_rank(peer));
}

std::string whereabouts(const Window& window, int peer) {
  return describe_whereabouts(window.process_page(peer), rank_name(window, peer));
}

bool contains(const std::vector<int>& peers, int peer) {
  return std::find(peers.begin(), peers.end(), peer) != peers.end();
}

/// The local peer that is this rank of the world, or -1.
int local_peer(const Window& window, int world_rank) {
  for (int peer = 0; peer < window.local_size(); ++peer) {
    if (window.process_page(peer).identity.rank == world_rank) return peer;
  }
  return -1;
}

/// These, and whom they in turn wait for with a message, and so on: those first who wait for no
/// other of them.
std::vector<int> with_whom_they_wait_for(const Window& window, std::vector<int> missing) {
  std::vector<int> waiting;
  for (std::size_t i = 0; i < missing.size(); ++i) {
    const int rank = whom_it_waits_for(window.process_page(missing[i]));
    const int peer = rank < 0 ? -1 : local_peer(window, rank);
    if (peer < 0 || peer == window.local_rank()) continue;
    waiting.push_back(missing[i]);
    if (!contains(missing, peer)) missing.push_back(peer);
  }
  std::stable_partition(missing.begin(), missing.end(),
                        [&](int peer) { return !contains(waiting, peer); });
  return missing;
}

std::string others(const std::vector<int>& missing, const char* separator) {
  if (missing.size() <= kMostDescribed) return "";
  return separator + std::to_string(missing.size() - kMostDescribed) + " other ranks";
}

}  // namespace

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

std::string describe_awaited(const Window& window, const std::vector<int>& missing) {
  const std::vector<int> all = with_whom_they_wait_for(window, missing);
  std::string text;
  for (std::size_t i = 0; i < all.size() && i < kMostDescribed; ++i) {
    text += (i == 0 ? "" : "; ") + whereabouts(window, all[i]);
  }
  return text + others(all, "; ");
}

std::string describe_present(const Window& window, const std::vector<int>& missing) {
  if (missing.empty()) return "";
  std::vector<int> here;
  for (int peer = 0; peer < window.local_size(); ++peer) {
    if (!contains(missing, peer)) here.push_back(window.group_rank(peer));
  }
  return "\n  Of this host's ranks " + rank_list(here) + " got there.";
}

std::string describe_missing(const Window& window, const std::vector<int>& missing) {
  const std::vector<int> all = with_whom_they_wait_for(window, missing);
  std::string text;
  const std::size_t described = std::min(all.size(), kMostDescribed);
  for (std::size_t i = 0; i < described; ++i) {
    text += "\n  " + whereabouts(window, all[i]) + ":" +
            stacks_of(window.process_page(all[i]), kMostStackBytes / described);
  }
  return text + others(all, "\n  ");
}

}  // namespace pycomm
