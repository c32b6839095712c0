#pragma once

#include <string>
#include <vector>

#include "transport/window.h"

namespace pycomm {

// What errors and warnings say of ranks that do not come.

/// What another rank may take to ask those who do not come, before this one gives up by itself;
/// seconds.
constexpr double kLongestInquiry = 5;

/// What a rank that waits for another one's part leaves it to say why that one waits; seconds.
constexpr double kFirstWord = 0.5;

/// "12.3 s"
std::string seconds_text(double seconds);

/// What the local ranks `missing` are doing, and those whose messages they wait for, in a line; see
/// describe_whereabouts.
std::string describe_awaited(const Window& window, const std::vector<int>& missing);

/// Which local ranks are not missing; a line to be added to an error.
std::string describe_present(const Window& window, const std::vector<int>& missing);

/// What the local ranks `missing` are doing, and those whose messages they wait for, with their
/// stacks: lines to be added to an error.
/// Waits up to a second for each of the first four.
std::string describe_missing(const Window& window, const std::vector<int>& missing);

}  // namespace pycomm
