#include "kernels/extent.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <initializer_list>
#include <string>

#include "core/error.h"
#include "kernels/copy_lines.h"

namespace pycomm {
namespace {

/// The exponent's place in the upper 16 bits of an element.
struct Format {
  Magnitude infinity;      // all ones
  Magnitude one_exponent;  // its last bit: what doubles a number
  std::uint64_t kept;      // of 64 bits of elements: their upper 16, without the sign
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0x7C00, 0x0400, 0x7FFF7FFF7FFF7FFF};
    case DType::kBFloat16:
      return {0x7F80, 0x0080, 0x7FFF7FFF7FFF7FFF};
    case DType::kFloat32:
      return {0x7F80, 0x0080, 0x7FFF00007FFF0000};
    case DType::kFloat64:
      return {0x7FF0, 0x0010, 0x7FFF000000000000};
    default:
      throw InvalidArgumentError(std::string("a magnitude of ") + name_of(dtype) +
                                 ": pass float16, bfloat16, float32 or float64.");
  }
}

/// The maximum of what passes, 16 bits at a time. Without their sign these are positive numbers,
/// and what is not an element's upper 16 bits is masked to zero, so one signed maximum, which every
/// x86-64 has, does for all dtypes. Little-endian.
class Largest {
 public:
  explicit Largest(const Format& format) {
    const std::uint64_t kept[2] = {format.kept, format.kept};
    std::memcpy(&kept_, kept, sizeof kept_);
  }

  void see(const Line& line) {
    a_ = larger(a_, line.a);
    b_ = larger(b_, line.b);
    c_ = larger(c_, line.c);
    d_ = larger(d_, line.d);
  }

  Magnitude result() const {
    std::int16_t largest = 0;
    for (const Halves& halves : {a_, b_, c_, d_}) {
      for (int lane = 0; lane < 8; ++lane) largest = std::max(largest, halves[lane]);
    }
    return static_cast<Magnitude>(largest);
  }

 private:
  using Halves __attribute__((vector_size(16))) = std::int16_t;

  Halves larger(Halves largest, Vector elements) const {
    const Halves halves = (Halves)elements & kept_;
    return halves > largest ? halves : largest;
  }

  Halves kept_{};
  Halves a_{}, b_{}, c_{}, d_{};  // independent of each other, to hide the latency
};

}  // namespace

Magnitude largest_magnitude(DType dtype, const std::byte* from, std::size_t bytes) {
  return pass_lines<Put::kNowhere>(nullptr, from, bytes, Largest(format_of(dtype))).result();
}

Magnitude copy_measured(DType dtype, std::byte* to, const std::byte* from, std::size_t bytes,
                        bool past_caches) {
  const Largest none(format_of(dtype));
  if (past_caches && bytes >= kShortestStreamBytes) {
    return pass_lines<Put::kPastCaches>(to, from, bytes, none).result();
  }
  return pass_lines<Put::kInCache>(to, from, bytes, none).result();
}

Extent extent_of(Magnitude magnitude, DType dtype, std::size_t summands) {
  const Format format = format_of(dtype);
  if (magnitude >= format.infinity) return Extent::kNonFinite;
  // Let infinity be 2^E. Of 2^k numbers below 2^(E-1-k) the sum is below 2^(E-1), and rounding does
  // not double it unless there are more than 2^7 partial sums of 8 bits each (the ring): for each
  // 2^7 there is one more exponent to spare.
  const std::size_t doublings = std::bit_width(std::max<std::size_t>(summands, 1) - 1);
  const std::size_t spare = (1 + doublings + summands / 128) * format.one_exponent;
  const std::size_t limit = format.infinity - std::min<std::size_t>(format.infinity, spare);
  return magnitude >= limit ? Extent::kLarge : Extent::kSummable;
}

}  // namespace pycomm
