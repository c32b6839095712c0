// The checksum is XXH64: the values of its reference implementation's own self-test.

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"
#include "kernels/checksum.h"

namespace {

using pycomm::checksum;

/// The bytes of that self-test.
std::vector<std::byte> sanity_buffer(std::size_t bytes) {
  std::vector<std::byte> data(bytes);
  std::uint64_t generator = 2654435761u;
  for (std::byte& byte : data) {
    byte = static_cast<std::byte>(generator >> 56);
    generator *= 11400714785074694797u;
  }
  return data;
}

}  // namespace

TEST(the_values_of_the_reference) {
  constexpr std::uint64_t kSeed = 2654435761u;
  const std::vector<std::byte> data = sanity_buffer(222);
  CHECK_EQUAL(checksum(data.data(), 0), 0xEF46DB3751D8E999u);
  CHECK_EQUAL(checksum(data.data(), 0, kSeed), 0xAC75FDA2929B17EFu);
  CHECK_EQUAL(checksum(data.data(), 1), 0xE934A84ADB052768u);
  CHECK_EQUAL(checksum(data.data(), 1, kSeed), 0x5014607643A9B4C3u);
  CHECK_EQUAL(checksum(data.data(), 4), 0x9136A0DCA57457EEu);
  CHECK_EQUAL(checksum(data.data(), 14), 0x8282DCC4994E35C8u);
  CHECK_EQUAL(checksum(data.data(), 14, kSeed), 0xC3BD6BF63DEB6DF0u);
  CHECK_EQUAL(checksum(data.data(), 222), 0xB641AE8CB691C174u);
  CHECK_EQUAL(checksum(data.data(), 222, kSeed), 0x20CB8AB7AE10C14Au);
}

TEST(every_bit_and_the_order_count) {
  for (const std::size_t bytes : {1, 3, 4, 7, 8, 31, 32, 33, 64, 100}) {
    std::vector<std::byte> data = sanity_buffer(bytes);
    const std::uint64_t whole = checksum(data.data(), bytes);
    for (std::size_t bit = 0; bit < 8 * bytes; ++bit) {
      data[bit / 8] ^= std::byte{1} << (bit % 8);
      CHECK(checksum(data.data(), bytes) != whole);
      // Two signs turned, at any distance: what a sum would not see.
      for (std::size_t other = bit % 32; other < bit; other += 32) {
        data[other / 8] ^= std::byte{1} << (other % 8);
        CHECK(checksum(data.data(), bytes) != whole);
        data[other / 8] ^= std::byte{1} << (other % 8);
      }
      data[bit / 8] ^= std::byte{1} << (bit % 8);
    }
    CHECK_EQUAL(checksum(data.data(), bytes), whole);
  }
  std::vector<std::byte> swapped = sanity_buffer(64);
  const std::uint64_t before = checksum(swapped.data(), 64);
  for (std::size_t i = 0; i < 8; ++i) std::swap(swapped[i], swapped[32 + i]);
  CHECK(checksum(swapped.data(), 64) != before);
}
