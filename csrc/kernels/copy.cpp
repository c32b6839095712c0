#include "kernels/copy.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

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

#if defined(__x86_64__)
/// Shorter copies are over before the first line has reached memory.
constexpr std::size_t kShortestStreamBytes = 32 << 10;

/// One cache line, so that the processor joins the stores into one write. `to` is aligned to it.
inline void stream_line(std::byte* to, const std::byte* from) {
  const auto* const source = reinterpret_cast<const __m128i*>(from);
  auto* const target = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(source);
  const __m128i b = _mm_loadu_si128(source + 1);
  const __m128i c = _mm_loadu_si128(source + 2);
  const __m128i d = _mm_loadu_si128(source + 3);
  _mm_stream_si128(target, a);
  _mm_stream_si128(target + 1, b);
  _mm_stream_si128(target + 2, c);
  _mm_stream_si128(target + 3, d);
}
#endif

}  // namespace

void copy_to_peers(std::byte* to, const std::byte* from, std::size_t bytes) {
  copy_ahead(to, from, bytes, to, fetch_to_write);
}

void copy_from_peers(std::byte* to, const std::byte* from, std::size_t bytes) {
  copy_ahead(to, from, bytes, from, fetch_to_read);
}

void copy_past_caches(std::byte* to, const std::byte* from, std::size_t bytes) {
#if defined(__x86_64__)
  if (bytes >= kShortestStreamBytes) {
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % kCacheLineBytes;
    std::memcpy(to, from, head);
    std::size_t at = head;
    for (; at + kCacheLineBytes <= bytes; at += kCacheLineBytes) stream_line(to + at, from + at);
    _mm_sfence();  // a release does not order streaming stores
    std::memcpy(to + at, from + at, bytes - at);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

}  // namespace pycomm
