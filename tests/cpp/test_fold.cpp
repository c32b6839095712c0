// The fold against a scalar reference that shares no code with it, on every instruction set this
// processor has. All comparisons are of bits.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "kernels/fold.h"
#include "kernels/fold_dispatch.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

using pycomm::DType;
using pycomm::FoldSpec;
using pycomm::ReduceOp;
using pycomm::detail::FoldLevel;
using Bytes = std::vector<std::byte>;

constexpr DType kDTypes[] = {DType::kUint8,    DType::kInt8,    DType::kInt16,
                             DType::kInt32,    DType::kInt64,   DType::kFloat16,
                             DType::kBFloat16, DType::kFloat32, DType::kFloat64};
constexpr ReduceOp kOps[] = {ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kMin, ReduceOp::kMax,
                             ReduceOp::kProd};

/// Every pair of dtypes a fold may have.
std::vector<FoldSpec> dtype_pairs() {
  std::vector<FoldSpec> pairs;
  for (DType dtype : kDTypes) pairs.push_back({dtype, dtype});
  for (DType narrow : {DType::kFloat16, DType::kBFloat16}) {
    pairs.push_back({narrow, DType::kFloat32});
    pairs.push_back({DType::kFloat32, narrow});
  }
  return pairs;
}

std::string text_of(const FoldSpec& spec) {
  return std::string(name_of(spec.source_dtype)) + " to " + name_of(spec.destination_dtype) + " " +
         name_of(spec.op) + " / " + std::to_string(spec.divisor);
}

// The reference: 16-bit floats are decoded and rounded by arithmetic on doubles.

template <typename T>
T element(const Bytes& bytes, std::size_t i) {
  T value;
  std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
void set_element(Bytes& bytes, std::size_t i, T value) {
  std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
}

struct Half {
  int mantissa_bits;
  int exponent_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int max_exponent() const { return (1 << exponent_bits) - 1; }
};
constexpr Half kBinary16{10, 5};
constexpr Half kBrain16{7, 8};

Half half_format(DType dtype) { return dtype == DType::kFloat16 ? kBinary16 : kBrain16; }

float decode(Half format, std::uint16_t bits) {
  int exponent = (bits >> format.mantissa_bits) & format.max_exponent();
  int mantissa = bits & ((1 << format.mantissa_bits) - 1);
  double magnitude;
  if (exponent == format.max_exponent()) {
    magnitude = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN()
                              : std::numeric_limits<double>::infinity();
  } else {
    int implicit_one = exponent == 0 ? 0 : 1 << format.mantissa_bits;
    magnitude = std::ldexp(implicit_one + mantissa,
                           std::max(exponent, 1) - format.bias() - format.mantissa_bits);
  }
  return static_cast<float>((bits & 0x8000) != 0 ? -magnitude : magnitude);
}

std::uint16_t encode(Half format, float value) {
  int infinity = format.max_exponent() << format.mantissa_bits;
  if (std::isnan(value)) {
    return static_cast<std::uint16_t>(infinity | 1 << (format.mantissa_bits - 1));
  }
  int sign = std::signbit(value) ? 0x8000 : 0;
  double magnitude = std::fabs(static_cast<double>(value));
  if (std::isinf(magnitude)) return static_cast<std::uint16_t>(sign | infinity);
  int exponent =
      magnitude == 0 ? 1 - format.bias() : std::max(std::ilogb(magnitude), 1 - format.bias());
  // In units of the last place; nearbyint rounds to even. A carry moves into the exponent.
  int places =
      static_cast<int>(std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent)));
  int bits = ((exponent + format.bias() - 1) << format.mantissa_bits) + places;
  return static_cast<std::uint16_t>(sign | std::min(bits, infinity));
}

std::int64_t load_integer(const Bytes& bytes, std::size_t i, DType dtype) {
  switch (dtype) {
    case DType::kUint8:
      return element<std::uint8_t>(bytes, i);
    case DType::kInt8:
      return element<std::int8_t>(bytes, i);
    case DType::kInt16:
      return element<std::int16_t>(bytes, i);
    case DType::kInt32:
      return element<std::int32_t>(bytes, i);
    default:
      return element<std::int64_t>(bytes, i);
  }
}

float load_float(const Bytes& bytes, std::size_t i, DType dtype) {
  if (dtype == DType::kFloat32) return element<float>(bytes, i);
  return decode(half_format(dtype), element<std::uint16_t>(bytes, i));
}

void store_float(Bytes& bytes, std::size_t i, DType dtype, float value) {
  if (dtype != DType::kFloat32) {
    set_element(bytes, i, encode(half_format(dtype), value));
  } else {
    set_element(bytes, i, std::isnan(value) ? std::numeric_limits<float>::quiet_NaN() : value);
  }
}

template <typename T>
T combine_floats(ReduceOp op, T a, T b) {
  if (op == ReduceOp::kProd) return a * b;
  if (op == ReduceOp::kMin || op == ReduceOp::kMax) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<T>::quiet_NaN();
    return (op == ReduceOp::kMin ? a < b : a > b) ? a : b;
  }
  return a + b;
}

std::int64_t combine_integers(ReduceOp op, std::int64_t a, std::int64_t b) {
  auto unsigned_a = static_cast<std::uint64_t>(a);
  auto unsigned_b = static_cast<std::uint64_t>(b);
  if (op == ReduceOp::kProd) return static_cast<std::int64_t>(unsigned_a * unsigned_b);
  if (op == ReduceOp::kMin) return std::min(a, b);
  if (op == ReduceOp::kMax) return std::max(a, b);
  return static_cast<std::int64_t>(unsigned_a + unsigned_b);
}

Bytes reference(const FoldSpec& spec, const std::vector<Bytes>& sources, std::size_t count) {
  Bytes result(count * size_of(spec.destination_dtype));
  bool copies =
      sources.size() == 1 && spec.source_dtype == spec.destination_dtype && spec.divisor == 1;
  if (copies) return Bytes(sources[0].begin(), sources[0].begin() + result.size());
  for (std::size_t i = 0; i < count; ++i) {
    if (spec.source_dtype == DType::kFloat64) {
      double folded = element<double>(sources[0], i);
      for (std::size_t s = 1; s < sources.size(); ++s) {
        folded = combine_floats(spec.op, folded, element<double>(sources[s], i));
      }
      folded /= static_cast<double>(spec.divisor);
      set_element(result, i,
                  std::isnan(folded) ? std::numeric_limits<double>::quiet_NaN() : folded);
    } else if (is_floating(spec.source_dtype)) {
      float folded = load_float(sources[0], i, spec.source_dtype);
      for (std::size_t s = 1; s < sources.size(); ++s) {
        folded = combine_floats(spec.op, folded, load_float(sources[s], i, spec.source_dtype));
      }
      store_float(result, i, spec.destination_dtype, folded / static_cast<float>(spec.divisor));
    } else {
      std::int64_t folded = load_integer(sources[0], i, spec.source_dtype);
      for (std::size_t s = 1; s < sources.size(); ++s) {
        folded = combine_integers(spec.op, folded, load_integer(sources[s], i, spec.source_dtype));
      }
      // The low bytes of a little-endian integer are the integer modulo its range.
      std::size_t size = size_of(spec.destination_dtype);
      std::memcpy(result.data() + i * size, &folded, size);
    }
  }
  return result;
}

// Inputs: random bits of every exponent, with the awkward values mixed in.

/// Bit patterns of zeros, the smallest and largest subnormals, one, the largest finite numbers,
/// infinities, and quiet and signalling NaNs with a sign and a payload.
std::vector<std::uint64_t> awkward_bits(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return {0, 0x8000, 1, 0x83ff, 0x3c00, 0x7bff, 0xfbff, 0x7c00, 0xfc00, 0x7e01, 0xfc01};
    case DType::kBFloat16:
      return {0, 0x8000, 1, 0x807f, 0x3f80, 0x7f7f, 0xff7f, 0x7f80, 0xff80, 0x7fc1, 0xff81};
    case DType::kFloat32:
      return {0,          0x80000000, 1,          0x807fffff, 0x3f800000, 0x7f7fffff,
              0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00001, 0xff800001};
    case DType::kFloat64:
      return {0,
              0x8000000000000000,
              1,
              0x800fffffffffffff,
              0x3ff0000000000000,
              0x7fefffffffffffff,
              0xffefffffffffffff,
              0x7ff0000000000000,
              0xfff0000000000000,
              0x7ff8000000000001,
              0xfff0000000000001};
    default:
      return {0, 1, ~std::uint64_t{0}, std::uint64_t{1} << (8 * size_of(dtype) - 1)};
  }
}

class Inputs {
 public:
  std::vector<Bytes> draw(DType dtype, std::size_t source_count, std::size_t count) {
    std::vector<std::uint64_t> awkward = awkward_bits(dtype);
    std::vector<Bytes> sources(source_count, Bytes(count * size_of(dtype)));
    for (Bytes& source : sources) {
      for (std::size_t i = 0; i < count; ++i) {
        std::uint64_t bits = random_();
        if (bits % 5 == 0) bits = awkward[random_() % awkward.size()];
        // The low bytes of a little-endian word.
        std::memcpy(source.data() + i * size_of(dtype), &bits, size_of(dtype));
      }
    }
    return sources;
  }
  std::size_t below(std::size_t end) { return random_() % end; }

 private:
  std::mt19937_64 random_{20240611};
};

/// Memory whose first element lies `offset` bytes behind a 64-byte boundary, with a guard after it.
class Placed {
 public:
  Placed(std::size_t size, std::size_t offset) : size_(size), memory_(size + 64 + 64 + kGuard) {
    auto misfit = reinterpret_cast<std::uintptr_t>(memory_.data()) % 64;
    start_ = 64 - misfit + offset;
    std::fill(memory_.begin(), memory_.end(), kUntouched);
  }
  Placed(const Bytes& content, std::size_t offset) : Placed(content.size(), offset) {
    std::copy(content.begin(), content.end(), data());
  }
  std::byte* data() { return memory_.data() + start_; }
  Bytes content() { return Bytes(data(), data() + size_); }
  bool surroundings_untouched() const {
    auto untouched = [](std::byte b) { return b == kUntouched; };
    return std::all_of(memory_.begin(), memory_.begin() + start_, untouched) &&
           std::all_of(memory_.begin() + start_ + size_, memory_.end(), untouched);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kUntouched{0xa5};
  std::size_t size_;
  Bytes memory_;
  std::size_t start_;
};

/// Fold with sources and destination misaligned by different amounts.
Bytes folded(const FoldLevel& level, const FoldSpec& spec, const std::vector<Bytes>& sources,
             std::size_t count, std::size_t offset) {
  std::vector<Placed> placed;
  std::vector<const std::byte*> pointers;
  placed.reserve(sources.size());
  for (const Bytes& source : sources) {
    placed.emplace_back(source, offset * (placed.size() + 2) % 64);
    pointers.push_back(placed.back().data());
  }
  Placed destination(count * size_of(spec.destination_dtype), offset);
  std::byte* pointer = destination.data();
  fold_to_all_at(level, spec, {&pointer, 1}, pointers, count);
  CHECK(destination.surroundings_untouched());
  for (std::size_t s = 0; s < sources.size(); ++s) CHECK(placed[s].content() == sources[s]);
  return destination.content();
}

void check_same(const Bytes& result, const Bytes& expected, const FoldSpec& spec,
                const std::string& where) {
  if (result == expected) return;
  std::size_t size = size_of(spec.destination_dtype);
  auto difference = std::mismatch(result.begin(), result.end(), expected.begin());
  std::size_t i = (difference.first - result.begin()) / size;
  std::string message = text_of(spec) + ", " + where + ": element " + std::to_string(i) + " is";
  for (const Bytes* bytes : {&result, &expected}) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, bytes->data() + i * size, size);
    char hex[32];
    std::snprintf(hex, sizeof(hex), " 0x%llx", static_cast<unsigned long long>(bits));
    message += (bytes == &result ? "" : ", expected") + std::string(hex);
  }
  check::fail(__FILE__, __LINE__, message);
}

template <typename T>
Bytes bytes_of(const std::vector<T>& values) {
  Bytes bytes(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

}  // namespace

TEST(every_dtype_op_count_and_alignment_matches_the_reference) {
  Inputs inputs;
  for (FoldSpec spec : dtype_pairs()) {
    for (ReduceOp op : kOps) {
      if (!can_reduce(spec.source_dtype, op)) continue;
      spec.op = op;
      for (std::size_t k = 1; k <= 5; ++k) {
        // 1, a true division, and a power of two, which is applied as its reciprocal.
        for (std::int64_t divisor : {1, 3, 8}) {
          if (divisor != 1 && !is_floating(spec.source_dtype)) continue;
          spec.divisor = divisor;
          for (std::size_t count : {0, 1, 7, 8, 31, 64, 65, 1000}) {
            auto sources = inputs.draw(spec.source_dtype, k, count);
            Bytes expected = reference(spec, sources, count);
            for (const FoldLevel& level : pycomm::detail::fold_levels()) {
              for (std::size_t offset : {0, 1, 8, 20}) {
                check_same(folded(level, spec, sources, count, offset), expected, spec,
                           std::string(level.name) + ", " + std::to_string(k) + " sources of " +
                               std::to_string(count) + " at offset " + std::to_string(offset));
              }
            }
          }
        }
      }
    }
  }
}

TEST(many_sources_match_the_reference) {
  Inputs inputs;
  constexpr std::size_t kCount = 333;
  for (FoldSpec spec : dtype_pairs()) {
    auto sources = inputs.draw(spec.source_dtype, 33, kCount);
    Bytes expected = reference(spec, sources, kCount);
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      check_same(folded(level, spec, sources, kCount, 0), expected, spec, level.name);
    }
  }
}

TEST(a_buffer_may_be_cut_anywhere) {
  Inputs inputs;
  constexpr std::size_t kCount = 777;
  for (FoldSpec spec : dtype_pairs()) {
    spec.divisor = is_floating(spec.source_dtype) ? 3 : 1;
    std::size_t source_size = size_of(spec.source_dtype);
    std::size_t destination_size = size_of(spec.destination_dtype);
    for (std::size_t k : {2, 3}) {
      auto sources = inputs.draw(spec.source_dtype, k, kCount);
      for (const FoldLevel& level : pycomm::detail::fold_levels()) {
        Bytes whole = folded(level, spec, sources, kCount, 0);
        Bytes pieces(whole.size());
        for (std::size_t i = 0; i < kCount;) {
          std::size_t piece = std::min(1 + inputs.below(200), kCount - i);
          std::vector<const std::byte*> from;
          for (const Bytes& source : sources) from.push_back(source.data() + i * source_size);
          std::byte* to = pieces.data() + i * destination_size;
          fold_to_all_at(level, spec, {&to, 1}, from, piece);
          i += piece;
        }
        check_same(pieces, whole, spec, level.name);
      }
    }
  }
}

TEST(all_16_bit_floats_widen_exactly) {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    FoldSpec spec{dtype, DType::kFloat32};
    Bytes expected = reference(spec, {bytes_of(all)}, all.size());
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      check_same(folded(level, spec, {bytes_of(all)}, all.size(), 0), expected, spec, level.name);
      // And come back as they were, but for NaNs, which become one.
      FoldSpec back{DType::kFloat32, dtype};
      check_same(folded(level, back, {expected}, all.size(), 0),
                 reference(back, {expected}, all.size()), back, level.name);
    }
  }
}

TEST(float32_rounds_to_nearest_even_around_every_16_bit_tie) {
  // Every upper half of a float32 with lower halves at, just below and just above the ties of
  // bfloat16 (bit 15) and float16 (bit 12).
  std::vector<std::uint32_t> bits;
  for (std::uint32_t upper = 0; upper < 65536; ++upper) {
    for (std::uint32_t lower : {0x0000, 0x0001, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001,
                                0x7fff, 0x8000, 0x8001, 0xffff}) {
      bits.push_back(upper << 16 | lower);
    }
  }
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    FoldSpec spec{DType::kFloat32, dtype};
    Bytes expected = reference(spec, {bytes_of(bits)}, bits.size());
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      check_same(folded(level, spec, {bytes_of(bits)}, bits.size(), 0), expected, spec, level.name);
    }
  }
}

TEST(sixteen_bit_sums_round_once) {
  // 1 is half of the last place of `large`: rounding after each addition would lose both ones.
  struct Case {
    DType dtype;
    float large;
  };
  for (Case c : {Case{DType::kFloat16, 2048}, Case{DType::kBFloat16, 256}}) {
    Half format = half_format(c.dtype);
    std::vector<std::uint16_t> large{encode(format, c.large)};
    std::vector<std::uint16_t> one{encode(format, 1)};
    std::vector<Bytes> sources{bytes_of(large), bytes_of(one), bytes_of(one)};
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      Bytes sum = folded(level, {c.dtype, c.dtype}, sources, 1, 0);
      CHECK_EQUAL(decode(format, element<std::uint16_t>(sum, 0)), c.large + 2);
      // The sum overflows float16, its average does not.
      std::vector<std::uint16_t> max{encode(kBinary16, 65504)};
      Bytes average = folded(level, {DType::kFloat16, DType::kFloat16, ReduceOp::kAvg, 2},
                             {bytes_of(max), bytes_of(max)}, 1, 0);
      CHECK_EQUAL(decode(kBinary16, element<std::uint16_t>(average, 0)), 65504.0f);
    }
  }
}

TEST(min_and_max_return_nan_whichever_source_has_it) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    for (ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax}) {
      for (std::size_t position = 0; position < 3; ++position) {
        std::vector<Bytes> sources(3, bytes_of(std::vector<float>(20, 1.0f)));
        sources[position] = bytes_of(std::vector<float>(20, nan));
        Bytes result = folded(level, {DType::kFloat32, DType::kFloat32, op}, sources, 20, 0);
        for (std::size_t i = 0; i < 20; ++i) CHECK(std::isnan(element<float>(result, i)));
      }
    }
  }
}

TEST(signed_zero_survives) {
  std::vector<Bytes> sources(3, bytes_of(std::vector<float>(5, -0.0f)));
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes sum = folded(level, {DType::kFloat32, DType::kFloat32}, sources, 5, 0);
    for (std::size_t i = 0; i < 5; ++i) CHECK(std::signbit(element<float>(sum, i)));
  }
}

TEST(every_nan_becomes_the_same_quiet_one) {
  // inf - inf, and two NaNs of different signs and payloads in both orders.
  std::vector<std::uint32_t> a{0x7f800000, 0x7fc00001, 0xffc00002, 0xff800001};
  std::vector<std::uint32_t> b{0xff800000, 0xffc00002, 0x7fc00001, 0x3f800000};
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes sum =
        folded(level, {DType::kFloat32, DType::kFloat32}, {bytes_of(a), bytes_of(b)}, a.size(), 0);
    for (std::size_t i = 0; i < a.size(); ++i) {
      CHECK_EQUAL(element<std::uint32_t>(sum, i), 0x7fc00000u);
    }
  }
}

TEST(integers_wrap) {
  std::vector<Bytes> sources{bytes_of(std::vector<std::int32_t>{2147483647, -2147483647 - 1}),
                             bytes_of(std::vector<std::int32_t>{1, -1})};
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes sum = folded(level, {DType::kInt32, DType::kInt32}, sources, 2, 0);
    CHECK_EQUAL(element<std::int32_t>(sum, 0), std::numeric_limits<std::int32_t>::min());
    CHECK_EQUAL(element<std::int32_t>(sum, 1), std::numeric_limits<std::int32_t>::max());
  }
}

TEST(the_destination_may_be_any_source) {
  Inputs inputs;
  for (FoldSpec spec : dtype_pairs()) {
    if (size_of(spec.destination_dtype) > size_of(spec.source_dtype)) continue;  // not allowed
    for (std::size_t k = 1; k <= 4; ++k) {
      for (std::size_t count : {5, 1000}) {
        auto sources = inputs.draw(spec.source_dtype, k, count);
        Bytes expected = reference(spec, sources, count);
        for (const FoldLevel& level : pycomm::detail::fold_levels()) {
          for (std::size_t aliased = 0; aliased < k; ++aliased) {
            std::vector<Bytes> memory = sources;
            std::vector<const std::byte*> from;
            for (const Bytes& source : memory) from.push_back(source.data());
            std::byte* to = memory[aliased].data();
            fold_to_all_at(level, spec, {&to, 1}, from, count);
            Bytes result(to, to + expected.size());
            check_same(result, expected, spec,
                       std::string(level.name) + " into source " + std::to_string(aliased));
          }
        }
      }
    }
  }
}

TEST(fold_to_all_writes_every_destination_even_over_the_sources) {
  Inputs inputs;
  for (FoldSpec spec : dtype_pairs()) {
    if (spec.source_dtype != spec.destination_dtype) continue;
    for (std::size_t k = 1; k <= 4; ++k) {
      for (std::size_t count : {0, 5, 1000}) {
        auto sources = inputs.draw(spec.source_dtype, k, count);
        Bytes expected = reference(spec, sources, count);
        for (const FoldLevel& level : pycomm::detail::fold_levels()) {
          std::vector<Bytes> memory = sources;
          memory.emplace_back(expected.size());  // and one that is no source
          std::vector<const std::byte*> from;
          std::vector<std::byte*> to;
          for (Bytes& bytes : memory) to.push_back(bytes.data());
          for (std::size_t s = 0; s < k; ++s) from.push_back(memory[s].data());
          fold_to_all_at(level, spec, to, from, count);
          for (const Bytes& result : memory) check_same(result, expected, spec, level.name);
          // As many destinations as sources: two of each have a loop of their own.
          memory.assign(sources.begin(), sources.end());
          for (std::size_t s = 0; s < k; ++s) from[s] = to[s] = memory[s].data();
          to.resize(k);
          fold_to_all_at(level, spec, to, from, count);
          for (const Bytes& result : memory) check_same(result, expected, spec, level.name);
        }
      }
    }
  }
}

#if defined(__x86_64__)
TEST(the_threads_floating_point_modes_neither_matter_nor_change) {
  Inputs inputs;
  constexpr std::size_t kCount = 1000;
  // Round up, flush subnormal results to zero, and read subnormals as zero.
  constexpr unsigned kUnusual = 0x1f80 | 0x4000 | 0x8000 | 0x0040;
  for (FoldSpec spec : dtype_pairs()) {
    if (!is_floating(spec.source_dtype)) continue;
    spec.divisor = 3;
    auto sources = inputs.draw(spec.source_dtype, 2, kCount);
    Bytes expected = reference(spec, sources, kCount);
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      unsigned before = _mm_getcsr();
      _mm_setcsr(kUnusual);
      Bytes result = folded(level, spec, sources, kCount, 0);
      unsigned after = _mm_getcsr();
      _mm_setcsr(before);
      check_same(result, expected, spec, level.name);
      CHECK_EQUAL(after, kUnusual);
    }
  }
}
#endif

TEST(impossible_folds_are_refused) {
  float value = 1;
  auto* destination = reinterpret_cast<std::byte*>(&value);
  const std::byte* source = destination;
  auto fold_of = [&](FoldSpec spec, std::size_t source_count = 1) {
    pycomm::fold(spec, destination, {&source, source_count}, 1);
  };
  using pycomm::InvalidArgumentError;
  CHECK_THROWS(fold_of({DType::kBool, DType::kBool}), InvalidArgumentError,
               "bool can only be moved");
  CHECK_THROWS(fold_of({DType::kInt32, DType::kInt32, ReduceOp::kAvg}), InvalidArgumentError,
               "AVG needs a floating dtype");
  CHECK_THROWS(fold_of({DType::kInt32, DType::kInt32, ReduceOp::kSum, 2}), InvalidArgumentError,
               "the divisor is 2");
  CHECK_THROWS(fold_of({DType::kFloat32, DType::kFloat32, ReduceOp::kSum, 0}), InvalidArgumentError,
               "the divisor is 0");
  CHECK_THROWS(fold_of({DType::kFloat32, DType::kFloat64}), InvalidArgumentError, "float64");
  CHECK_THROWS(fold_of({DType::kFloat16, DType::kBFloat16}), InvalidArgumentError, "bfloat16");
  CHECK_THROWS(fold_of({DType::kFloat32, DType::kFloat32}, 0), InvalidArgumentError,
               "at least one source");
  CHECK_EQUAL(value, 1.0f);
}

TEST(the_chosen_level_is_one_that_exists) {
  auto levels = pycomm::detail::fold_levels();
  CHECK_EQUAL(levels.back().name, "baseline");
  auto is_chosen = [](const FoldLevel& l) {
    return l.name == std::string_view(pycomm::simd_level());
  };
  CHECK(std::any_of(levels.begin(), levels.end(), is_chosen));
}

TEST(the_environment_lowers_the_level) {
  auto levels = pycomm::detail::fold_levels();
  CHECK_EQUAL(pycomm::detail::choose_fold_level(nullptr).name, levels.front().name);
  CHECK_EQUAL(pycomm::detail::choose_fold_level("").name, levels.front().name);
  CHECK_EQUAL(pycomm::detail::choose_fold_level("baseline").name, "baseline");
  CHECK_THROWS(pycomm::detail::choose_fold_level("mmx"), pycomm::InvalidArgumentError,
               "PYCOMM_SIMD=mmx");
}
