#include "kernels/checksum.h"

#include <bit>
#include <cstring>
#include <initializer_list>

namespace pycomm {
namespace {

// The names are the specification's.
constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5;

constexpr std::size_t kStripeBytes = 32;

/// Little-endian, as everything here.
template <typename T>
std::uint64_t read(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

std::uint64_t round(std::uint64_t accumulator, std::uint64_t lane) {
  return std::rotl(accumulator + lane * kPrime2, 31) * kPrime1;
}

std::uint64_t merge(std::uint64_t accumulator, std::uint64_t other) {
  return (accumulator ^ round(0, other)) * kPrime1 + kPrime4;
}

}  // namespace

std::uint64_t checksum(const std::byte* from, std::size_t bytes, std::uint64_t seed) {
  const std::byte* const end = from + bytes;
  std::uint64_t sum = seed + kPrime5;
  if (bytes >= kStripeBytes) {
    std::uint64_t a = seed + kPrime1 + kPrime2;
    std::uint64_t b = seed + kPrime2;
    std::uint64_t c = seed;
    std::uint64_t d = seed - kPrime1;
    for (; static_cast<std::size_t>(end - from) >= kStripeBytes; from += kStripeBytes) {
      a = round(a, read<std::uint64_t>(from));
      b = round(b, read<std::uint64_t>(from + 8));
      c = round(c, read<std::uint64_t>(from + 16));
      d = round(d, read<std::uint64_t>(from + 24));
    }
    sum = std::rotl(a, 1) + std::rotl(b, 7) + std::rotl(c, 12) + std::rotl(d, 18);
    for (const std::uint64_t accumulator : {a, b, c, d}) sum = merge(sum, accumulator);
  }
  sum += bytes;
  for (; end - from >= 8; from += 8) {
    sum = std::rotl(sum ^ round(0, read<std::uint64_t>(from)), 27) * kPrime1 + kPrime4;
  }
  if (end - from >= 4) {
    sum = std::rotl(sum ^ (read<std::uint32_t>(from) * kPrime1), 23) * kPrime2 + kPrime3;
    from += 4;
  }
  for (; from != end; ++from) {
    sum = std::rotl(sum ^ (read<std::uint8_t>(from) * kPrime5), 11) * kPrime1;
  }
  sum = (sum ^ (sum >> 33)) * kPrime2;
  sum = (sum ^ (sum >> 29)) * kPrime3;
  return sum ^ (sum >> 32);
}

}  // namespace pycomm
