#pragma once

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

namespace pycomm {

/// "0, 1, 2", for texts; "0, 1, ..." beyond the first `most`.
inline std::string rank_list(const std::vector<int>& ranks,
                             std::size_t most = std::numeric_limits<std::size_t>::max()) {
  std::string text;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i > 0) text += ", ";
    if (i == most) return text + "...";
    text += std::to_string(ranks[i]);
  }
  return text;
}

}  // namespace pycomm
