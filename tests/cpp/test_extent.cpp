// How large floats are: the measure of each dtype against its own definition, and copies that
// measure, at every length and alignment around their steps.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "core/error.h"
#include "kernels/extent.h"

namespace {

using pycomm::copy_measured;
using pycomm::DType;
using pycomm::Extent;
using pycomm::extent_of;
using pycomm::largest_magnitude;
using pycomm::Magnitude;
using pycomm::size_of;

constexpr DType kFloats[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};

/// An element's bits, without its sign, in the low bits.
std::uint64_t absolute_bits(DType dtype, const std::byte* element) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, element, size_of(dtype));
  return bits & ~(std::uint64_t{1} << (8 * size_of(dtype) - 1));
}

Magnitude expected(DType dtype, const std::byte* from, std::size_t bytes) {
  std::uint64_t largest = 0;
  for (std::size_t at = 0; at < bytes; at += size_of(dtype)) {
    largest = std::max(largest, absolute_bits(dtype, from + at));
  }
  return static_cast<Magnitude>(largest >> (8 * size_of(dtype) - 16));
}

std::vector<std::byte> random_bytes(std::size_t bytes) {
  std::mt19937 generator(static_cast<std::uint32_t>(bytes));
  std::vector<std::byte> data(bytes);
  for (std::byte& byte : data) byte = static_cast<std::byte>(generator());
  return data;
}

template <typename T>
Extent extent(DType dtype, T value, std::size_t summands) {
  const auto* const at = reinterpret_cast<const std::byte*>(&value);
  return extent_of(largest_magnitude(dtype, at, sizeof value), dtype, summands);
}

}  // namespace

TEST(the_largest_is_found_wherever_it_lies) {
  for (const DType dtype : kFloats) {
    for (const std::size_t count : {0, 1, 2, 7, 8, 9, 31, 32, 33, 100}) {
      const std::size_t size = size_of(dtype);
      for (std::size_t place = 0; place < count; ++place) {
        // Numbers between 1 and 2 in every dtype or so, and one -infinity.
        std::vector<std::byte> data(count * size, std::byte{0x3D});
        std::memset(data.data() + place * size, 0, size);
        const std::uint16_t infinity = dtype == DType::kFloat16   ? 0xFC00
                                       : dtype == DType::kFloat64 ? 0xFFF0
                                                                  : 0xFF80;
        std::memcpy(data.data() + (place + 1) * size - 2, &infinity, 2);
        CHECK_EQUAL(largest_magnitude(dtype, data.data(), data.size()), infinity & 0x7FFF);
      }
      const std::vector<std::byte> data = random_bytes(count * size);
      CHECK_EQUAL(largest_magnitude(dtype, data.data(), data.size()),
                  expected(dtype, data.data(), data.size()));
    }
  }
}

TEST(measured_copies_copy_every_byte_and_no_other_and_measure_all) {
  constexpr std::size_t kGuard = 64;
  constexpr std::byte kUntouched{0xA5};
  for (const DType dtype : kFloats) {
    const std::size_t size = size_of(dtype);
    for (const std::size_t count : {0, 1, 15, 16, 17, 8191, 8192, 16384 + 5, 50021}) {
      const std::size_t bytes = count * size;
      const std::vector<std::byte> from = random_bytes(bytes + size);
      for (const std::size_t offset : {std::size_t{0}, size, std::size_t{16}, 64 - size}) {
        for (const bool past_caches : {false, true}) {
          std::vector<std::byte> to(offset + bytes + kGuard, kUntouched);
          const Magnitude measured =
              copy_measured(dtype, to.data() + offset, from.data() + size, bytes, past_caches);
          CHECK_EQUAL(measured, expected(dtype, from.data() + size, bytes));
          CHECK(bytes == 0 || std::memcmp(to.data() + offset, from.data() + size, bytes) == 0);
          for (std::size_t i = 0; i < to.size(); ++i) {
            if (i >= offset && i < offset + bytes) continue;
            CHECK(to[i] == kUntouched);
          }
        }
      }
    }
  }
}

TEST(extents_of_particular_numbers) {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  CHECK_EQUAL(extent(DType::kFloat32, 0.0f, 4), Extent::kSummable);
  CHECK_EQUAL(extent(DType::kFloat32, -1e30f, 4), Extent::kSummable);
  CHECK_EQUAL(extent(DType::kFloat32, std::ldexp(1.0f, 125), 4), Extent::kLarge);
  CHECK_EQUAL(extent(DType::kFloat32, std::nextafter(std::ldexp(1.0f, 125), 0.0f), 4),
              Extent::kSummable);
  CHECK_EQUAL(extent(DType::kFloat32, -kMax, 4), Extent::kLarge);
  CHECK_EQUAL(extent(DType::kFloat32, -kInfinity, 4), Extent::kNonFinite);
  CHECK_EQUAL(extent(DType::kFloat32, std::numeric_limits<float>::quiet_NaN(), 4),
              Extent::kNonFinite);
  // A NaN whose payload is all below the upper half, as a float16 infinity's bits are.
  CHECK_EQUAL(extent(DType::kFloat32, std::bit_cast<float>(0xFF800001u), 4), Extent::kNonFinite);
  CHECK_EQUAL(extent(DType::kFloat64, std::numeric_limits<double>::max(), 1), Extent::kLarge);
  CHECK_EQUAL(extent(DType::kFloat64, std::bit_cast<double>(0x7FF0000000000001u), 1),
              Extent::kNonFinite);
  CHECK_EQUAL(extent(DType::kFloat16, std::uint16_t{0x7BFF}, 2), Extent::kLarge);      // 65504
  CHECK_EQUAL(extent(DType::kFloat16, std::uint16_t{0x6BFF}, 8), Extent::kSummable);   // below 4096
  CHECK_EQUAL(extent(DType::kFloat16, std::uint16_t{0xFC00}, 2), Extent::kNonFinite);  // -inf
  CHECK_EQUAL(extent(DType::kBFloat16, std::uint16_t{0x7F7F}, 2), Extent::kLarge);
  CHECK_EQUAL(extent(DType::kBFloat16, std::uint16_t{0x7FC0}, 2), Extent::kNonFinite);
}

TEST(what_is_summable_has_a_finite_sum) {
  // The largest such number, from every rank, folded in float32: the law that spares the look at
  // the sum.
  for (const std::size_t summands : {1, 2, 3, 4, 5, 8, 100, 1000, 4096}) {
    float largest = std::numeric_limits<float>::max();
    while (extent(DType::kFloat32, largest, summands) != Extent::kSummable) {
      largest = std::nextafter(largest / 2, 0.0f);
    }
    float sum = 0;
    for (std::size_t i = 0; i < summands; ++i) sum += largest;
    CHECK(std::isfinite(sum));
    // And it is not a law that calls everything large.
    CHECK_EQUAL(extent(DType::kFloat32, 1e20f, summands), Extent::kSummable);
  }
}

TEST(other_dtypes_are_refused) {
  CHECK_THROWS(largest_magnitude(DType::kInt32, nullptr, 0), pycomm::InvalidArgumentError,
               "a magnitude of int32");
}
