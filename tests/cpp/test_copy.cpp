// Copies for other cores: every length around their steps, at any alignment, and not a byte more.

#include <cstddef>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/copy.h"

namespace {

using Copy = void (*)(std::byte*, const std::byte*, std::size_t);

void check_copy(Copy copy, std::size_t bytes, std::size_t to_offset, std::size_t from_offset) {
  constexpr std::size_t kGuard = 64;
  constexpr std::byte kUntouched{0xA5};
  std::vector<std::byte> from(from_offset + bytes);
  for (std::size_t i = 0; i < bytes; ++i) from[from_offset + i] = static_cast<std::byte>(i % 251);
  std::vector<std::byte> to(to_offset + bytes + kGuard, kUntouched);
  copy(to.data() + to_offset, from.data() + from_offset, bytes);
  for (std::size_t i = 0; i < to.size(); ++i) {
    const bool copied = i >= to_offset && i < to_offset + bytes;
    if (to[i] != (copied ? static_cast<std::byte>((i - to_offset) % 251) : kUntouched)) {
      throw check::Failure("byte " + std::to_string(i) + " of a copy of " + std::to_string(bytes) +
                           " bytes to offset " + std::to_string(to_offset));
    }
  }
}

}  // namespace

TEST(copies_between_cores_copy_every_byte_and_no_other) {
  for (const Copy copy : {pycomm::copy_to_peers, pycomm::copy_from_peers}) {
    for (const std::size_t bytes :
         {0, 1, 63, 64, 65, 2047, 2048, 2049, 4095, 4096, 4097, 6144, 100003}) {
      for (const std::size_t offset : {0, 1, 24}) {
        check_copy(copy, bytes, offset, 0);
        check_copy(copy, bytes, 0, offset);
      }
    }
  }
}

TEST(copies_past_the_caches_copy_every_byte_and_no_other) {
  constexpr std::size_t kStreams = 32 << 10;  // from here on
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, kStreams - 1, kStreams,
                                  kStreams + 1, kStreams + 63, std::size_t{100003}}) {
    for (const std::size_t to_offset : {0, 1, 4, 16, 60, 63}) {
      for (const std::size_t from_offset : {0, 3, 16}) {
        check_copy(pycomm::copy_past_caches, bytes, to_offset, from_offset);
      }
    }
  }
}
