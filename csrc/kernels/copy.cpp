#include "kernels/copy.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pycomm {
namespace {

#if defined(__x86_64__)
constexpr std::size_t kCacheLineBytes = 64;

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

void copy_past_caches(std::byte* to, const std::byte* from, std::size_t bytes) {
  if (bytes == 0) return;  // of no address, which memcpy does not allow
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
