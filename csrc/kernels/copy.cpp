#include "kernels/copy.h"

#include <algorithm>
#include <cstring>

namespace pycomm {
namespace {

constexpr std::size_t kCacheLineBytes = 64;

/// A block is copied while the lines of the next are on their way. Short enough for memcpy to use
/// its loop over the widest registers.
constexpr std::size_t kBlockBytes = 2048;

/// Ask for a line to write to it: whoever else holds it must give it up.
inline void fetch_to_write(std::byte* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" ::"m"(*line));  // the compiler emits it only for newer processors
#else
  __builtin_prefetch(line, /*rw=*/1);
#endif
}

/// Into the second-level cache, which has more requests under way than the first.
inline void fetch_to_read(const std::byte* line) {
  __builtin_prefetch(line, /*rw=*/0, /*locality=*/2);
}

/// @param distant  `to` or `from`: whose lines another core has.
template <typename Byte, typename Fetch>
void copy_ahead(std::byte* to, const std::byte* from, std::size_t bytes, Byte* distant,
                const Fetch& fetch) {
  const auto fetch_block = [&](std::size_t begin) {
    const std::size_t end = std::min(bytes, begin + kBlockBytes);
    for (std::size_t i = begin; i < end; i += kCacheLineBytes) fetch(distant + i);
  };
  fetch_block(0);
  for (std::size_t begin = 0; begin < bytes; begin += kBlockBytes) {
    fetch_block(begin + kBlockBytes);
    std::memcpy(to + begin, from + begin, std::min(kBlockBytes, bytes - begin));
  }
}

}  // namespace

void copy_to_peers(std::byte* to, const std::byte* from, std::size_t bytes) {
  copy_ahead(to, from, bytes, to, fetch_to_write);
}

void copy_from_peers(std::byte* to, const std::byte* from, std::size_t bytes) {
  copy_ahead(to, from, bytes, from, fetch_to_read);
}

}  // namespace pycomm
