#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace pycomm {

/// Every x86-64 and AArch64 has registers of this width.
using Vector __attribute__((vector_size(16))) = long long;

/// A cache line in registers: four of them by name, since compilers leave an array in memory.
struct Line {
  static constexpr std::size_t kBytes = 64;

  explicit Line(const std::byte* from)
      : a(load(from)), b(load(from + 16)), c(load(from + 32)), d(load(from + 48)) {}

  static Vector load(const std::byte* from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
  }

  Vector a, b, c, d;
};

/// Where what passes is copied to.
enum class Put {
  kNowhere,
  kInCache,
  kPastCaches,  // of processors that can; to whole lines
};

/// Shorter copies past the caches are over before the first line has reached memory.
inline constexpr std::size_t kShortestStreamBytes = 32 << 10;

template <Put put>
inline void put_vector(std::byte* to, Vector vector) {
#if defined(__x86_64__)
  if constexpr (put == Put::kPastCaches) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)vector);
    return;
  }
#endif
  std::memcpy(to, &vector, sizeof vector);
}

/// All of a line at once, so that the processor joins the stores past the caches into one write.
template <Put put>
inline void put_line(std::byte* to, const Line& line) {
  put_vector<put>(to, line.a);
  put_vector<put>(to + 16, line.b);
  put_vector<put>(to + 32, line.c);
  put_vector<put>(to + 48, line.d);
}

/// Copy `bytes`, and let `observer.see(Line)` see all of them, in order: first what lies before the
/// first whole line of `to`, and last what does not fill one, each followed by zeros. Returns the
/// observer, which has no address until then, and so stays in registers.
template <Put put, typename Observer>
inline Observer pass_lines(std::byte* to, const std::byte* from, std::size_t bytes,
                           Observer observer) {
  const auto pass_part = [&](std::size_t begin, std::size_t end) {
    if (begin == end) return;
    std::byte padded[Line::kBytes] = {};
    std::memcpy(padded, from + begin, end - begin);
    observer.see(Line(padded));
    if constexpr (put != Put::kNowhere) std::memcpy(to + begin, padded, end - begin);
  };
  std::size_t at = 0;
  if constexpr (put == Put::kPastCaches) {
    const std::size_t head = -reinterpret_cast<std::uintptr_t>(to) % Line::kBytes;
    at = head < bytes ? head : bytes;
    pass_part(0, at);
  }
  for (; at + Line::kBytes <= bytes; at += Line::kBytes) {
    const Line line(from + at);
    observer.see(line);
    if constexpr (put != Put::kNowhere) put_line<put>(to + at, line);
  }
#if defined(__x86_64__)
  if constexpr (put == Put::kPastCaches) _mm_sfence();  // a release orders no streaming stores
#endif
  pass_part(at, bytes);
  return observer;
}

}  // namespace pycomm
