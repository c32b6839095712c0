#include "group/absence.h"

#include <algorithm>
#include <cstdio>

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
  std::string text;
  for (std::size_t i = 0; i < missing.size() && i < kMostDescribed; ++i) {
    text += (i == 0 ? "" : "; ") + whereabouts(window, missing[i]);
  }
  return text + others(missing, "; ");
}

std::string describe_present(const Window& window, const std::vector<int>& missing) {
  if (missing.empty()) return "";
  std::string here;
  for (int peer = 0; peer < window.local_size(); ++peer) {
    if (std::find(missing.begin(), missing.end(), peer) != missing.end()) continue;
    here += (here.empty() ? "" : ", ") + std::to_string(window.group_rank(peer));
  }
  return "\n  Of this host's ranks " + here + " got there.";
}

std::string describe_missing(const Window& window, const std::vector<int>& missing) {
  std::string text;
  const std::size_t described = std::min(missing.size(), kMostDescribed);
  for (std::size_t i = 0; i < described; ++i) {
    text += "\n  " + whereabouts(window, missing[i]) + ":" +
            stacks_of(window.process_page(missing[i]), kMostStackBytes / described);
  }
  return text + others(missing, "\n  ");
}

}  // namespace pycomm
