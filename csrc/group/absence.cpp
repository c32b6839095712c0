#include "group/absence.h"

#include <algorithm>
#include <cstdio>

#include "transport/whereabouts.h"

namespace pycomm {
namespace {

/// Of all stacks together: what they leave of a notice is for the rest of the error.
constexpr std::size_t kMostStackBytes = 6000;

std::string rank_name(const Window& window, int peer) {
  return "rank " + std::to_string(window.group_rank(peer));
}

}  // namespace

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

std::string whereabouts(const Window& window, int peer) {
  return describe_whereabouts(window.process_page(peer), rank_name(window, peer));
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
  for (const int peer : missing) {
    text += "\n  " + whereabouts(window, peer) + ":" +
            stacks_of(window.process_page(peer), kMostStackBytes / missing.size());
  }
  return text;
}

}  // namespace pycomm
