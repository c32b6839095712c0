#pragma once

#include <cstddef>

namespace pycomm {

/// Copy `bytes` to where nobody reads soon. A long copy goes past the caches: the old lines of
/// `to`, which another core may hold, are not fetched to be overwritten, and what the caches held
/// stays. Of 42 MB, 4 MB at a time, this took 2.5 to 4 ms where memcpy took 7 (the same machine).
void copy_past_caches(std::byte* to, const std::byte* from, std::size_t bytes);

}  // namespace pycomm
