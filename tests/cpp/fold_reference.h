#pragma once

// What the tests of the fold share: a scalar reference that shares no code with it, inputs with
// every awkward value, and buffers at any alignment. All comparisons are of bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "kernels/fold.h"
#include "kernels/fold_dispatch.h"

namespace fold_test {

using pycomm::DType;
using pycomm::FoldSpec;
using pycomm::ReduceOp;
using pycomm::detail::FoldLevel;
using Bytes = std::vector<std::byte>;

/// All that are folded.
constexpr DType kDTypes[] = {DType::kBool,    DType::kUint8,     DType::kInt8,
                             DType::kInt16,   DType::kInt32,     DType::kInt64,
                             DType::kFloat16, DType::kBFloat16,  DType::kFloat32,
                             DType::kFloat64, DType::kComplex64, DType::kComplex128};
constexpr ReduceOp kOps[] = {ReduceOp::kSum,  ReduceOp::kAvg,  ReduceOp::kMin, ReduceOp::kMax,
                             ReduceOp::kProd, ReduceOp::kBand, ReduceOp::kBor, ReduceOp::kBxor};

/// Every pair of dtypes a fold may have.
inline std::vector<FoldSpec> dtype_pairs() {
  std::vector<FoldSpec> pairs;
  for (DType dtype : kDTypes) pairs.push_back({dtype, dtype});
  for (DType narrow : {DType::kFloat16, DType::kBFloat16}) {
    pairs.push_back({narrow, DType::kFloat32});
    pairs.push_back({DType::kFloat32, narrow});
  }
  return pairs;
}

inline std::string text_of(const FoldSpec& spec) {
  return std::string(name_of(spec.source_dtype)) + " to " + name_of(spec.destination_dtype) + " " +
         name_of(spec.op) + " of " + std::to_string(spec.prescale) + " x / " +
         std::to_string(spec.divisor) + " * " + std::to_string(spec.postscale);
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

inline Half half_format(DType dtype) { return dtype == DType::kFloat16 ? kBinary16 : kBrain16; }

inline float decode(Half format, std::uint16_t bits) {
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

inline std::uint16_t encode(Half format, float value) {
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

inline std::int64_t load_integer(const Bytes& bytes, std::size_t i, DType dtype) {
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

inline float load_float(const Bytes& bytes, std::size_t i, DType dtype) {
  if (dtype == DType::kFloat32) return element<float>(bytes, i);
  return decode(half_format(dtype), element<std::uint16_t>(bytes, i));
}

template <typename T>
void store_real(Bytes& bytes, std::size_t i, T value) {
  set_element(bytes, i, std::isnan(value) ? std::numeric_limits<T>::quiet_NaN() : value);
}

inline void store_float(Bytes& bytes, std::size_t i, DType dtype, float value) {
  if (dtype == DType::kFloat32) return store_real(bytes, i, value);
  set_element(bytes, i, encode(half_format(dtype), value));
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

inline std::int64_t combine_integers(ReduceOp op, std::int64_t a, std::int64_t b) {
  auto unsigned_a = static_cast<std::uint64_t>(a);
  auto unsigned_b = static_cast<std::uint64_t>(b);
  if (op == ReduceOp::kProd) return static_cast<std::int64_t>(unsigned_a * unsigned_b);
  if (op == ReduceOp::kMin) return std::min(a, b);
  if (op == ReduceOp::kMax) return std::max(a, b);
  if (op == ReduceOp::kBand) return a & b;
  if (op == ReduceOp::kBor) return a | b;
  if (op == ReduceOp::kBxor) return a ^ b;
  return static_cast<std::int64_t>(unsigned_a + unsigned_b);
}

inline bool combine_bools(ReduceOp op, bool a, bool b) {
  if (op == ReduceOp::kBxor) return a != b;
  bool both = op == ReduceOp::kProd || op == ReduceOp::kMin || op == ReduceOp::kBand;
  return both ? a && b : a || b;
}

/// One real number of the result; `load(s)` is the same number of source s.
template <typename T, typename Load>
T fold_reals(const FoldSpec& spec, std::size_t source_count, Load load) {
  T folded = load(0) * static_cast<T>(spec.prescale);
  for (std::size_t s = 1; s < source_count; ++s) {
    folded = combine_floats<T>(spec.op, folded, load(s) * static_cast<T>(spec.prescale));
  }
  return folded / static_cast<T>(spec.divisor) * static_cast<T>(spec.postscale);
}

inline bool is_copy(const FoldSpec& spec, std::size_t source_count) {
  return source_count == 1 && spec.source_dtype == spec.destination_dtype && spec.divisor == 1 &&
         spec.prescale == 1 && spec.postscale == 1;
}

inline Bytes reference(const FoldSpec& spec, const std::vector<Bytes>& sources, std::size_t count) {
  const DType dtype = spec.source_dtype;
  Bytes result(count * size_of(spec.destination_dtype));
  if (is_copy(spec, sources.size())) {
    return Bytes(sources[0].begin(), sources[0].begin() + result.size());
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (is_complex(dtype)) {
      for (std::size_t component : {2 * i, 2 * i + 1}) {
        if (dtype == DType::kComplex64) {
          auto load = [&](std::size_t s) { return element<float>(sources[s], component); };
          store_real(result, component, fold_reals<float>(spec, sources.size(), load));
        } else {
          auto load = [&](std::size_t s) { return element<double>(sources[s], component); };
          store_real(result, component, fold_reals<double>(spec, sources.size(), load));
        }
      }
    } else if (dtype == DType::kFloat64) {
      auto load = [&](std::size_t s) { return element<double>(sources[s], i); };
      store_real(result, i, fold_reals<double>(spec, sources.size(), load));
    } else if (is_floating(dtype)) {
      auto load = [&](std::size_t s) { return load_float(sources[s], i, dtype); };
      store_float(result, i, spec.destination_dtype, fold_reals<float>(spec, sources.size(), load));
    } else if (dtype == DType::kBool) {
      bool folded = sources[0][i] != std::byte{0};
      for (std::size_t s = 1; s < sources.size(); ++s) {
        folded = combine_bools(spec.op, folded, sources[s][i] != std::byte{0});
      }
      result[i] = static_cast<std::byte>(folded ? 1 : 0);
    } else {
      std::int64_t folded = load_integer(sources[0], i, dtype);
      for (std::size_t s = 1; s < sources.size(); ++s) {
        folded = combine_integers(spec.op, folded, load_integer(sources[s], i, dtype));
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
inline std::vector<std::uint64_t> awkward_bits(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return {0, 0, 1, 1, 2, 0x80, 0xff};
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
    if (dtype == DType::kComplex64) return draw(DType::kFloat32, source_count, 2 * count);
    if (dtype == DType::kComplex128) return draw(DType::kFloat64, source_count, 2 * count);
    std::vector<std::uint64_t> awkward = awkward_bits(dtype);
    std::vector<Bytes> sources(source_count, Bytes(count * size_of(dtype)));
    for (Bytes& source : sources) {
      for (std::size_t i = 0; i < count; ++i) {
        std::uint64_t bits = random_();
        // A random byte would hardly ever be false.
        if (bits % 5 == 0 || dtype == DType::kBool) bits = awkward[random_() % awkward.size()];
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
  Bytes content() const {
    Bytes content(size_);
    std::copy_n(memory_.data() + start_, size_, content.data());
    return content;
  }
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
inline Bytes folded(const FoldLevel& level, const FoldSpec& spec, const std::vector<Bytes>& sources,
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

inline void check_same(const Bytes& result, const Bytes& expected, const FoldSpec& spec,
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

}  // namespace fold_test
