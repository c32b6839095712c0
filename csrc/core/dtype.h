#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm {

/// Element types. The numbers travel in signatures between ranks, so they never change.
enum class DType : std::uint8_t {
  kBool = 0,
  kUint8 = 1,
  kInt8 = 2,
  kInt16 = 3,
  kInt32 = 4,
  kInt64 = 5,
  kFloat16 = 6,
  kBFloat16 = 7,
  kFloat32 = 8,
  kFloat64 = 9,
  kComplex64 = 10,
  kComplex128 = 11,
  // Only moved.
  kFloat8E4M3Fn = 12,
  kFloat8E4M3Fnuz = 13,
  kFloat8E5M2 = 14,
  kFloat8E5M2Fnuz = 15,
  kFloat8E8M0Fnu = 16,
};

/// Bytes of one element.
constexpr std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kUint8:
    case DType::kInt8:
    case DType::kFloat8E4M3Fn:
    case DType::kFloat8E4M3Fnuz:
    case DType::kFloat8E5M2:
    case DType::kFloat8E5M2Fnuz:
    case DType::kFloat8E8M0Fnu:
      return 1;
    case DType::kInt16:
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
    case DType::kFloat32:
      return 4;
    case DType::kInt64:
    case DType::kFloat64:
    case DType::kComplex64:
      return 8;
    case DType::kComplex128:
      return 16;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return "bool";
    case DType::kUint8:
      return "uint8";
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kComplex64:
      return "complex64";
    case DType::kComplex128:
      return "complex128";
    case DType::kFloat8E4M3Fn:
      return "float8_e4m3fn";
    case DType::kFloat8E4M3Fnuz:
      return "float8_e4m3fnuz";
    case DType::kFloat8E5M2:
      return "float8_e5m2";
    case DType::kFloat8E5M2Fnuz:
      return "float8_e5m2fnuz";
    case DType::kFloat8E8M0Fnu:
      return "float8_e8m0fnu";
  }
  return "unknown dtype";
}

/// A real floating dtype that reductions know.
constexpr bool is_floating(DType dtype) {
  return dtype >= DType::kFloat16 && dtype <= DType::kFloat64;
}

constexpr bool is_complex(DType dtype) {
  return dtype == DType::kComplex64 || dtype == DType::kComplex128;
}

constexpr bool is_float8(DType dtype) { return dtype >= DType::kFloat8E4M3Fn; }

constexpr bool is_integer(DType dtype) { return dtype >= DType::kUint8 && dtype <= DType::kInt64; }

/// What a quotient or a factor makes sense for.
constexpr bool is_scalable(DType dtype) { return is_floating(dtype) || is_complex(dtype); }

/// The type in which a fold of `dtype` is carried: 16-bit floats are summed in float32 and rounded
/// once at the end, everything else is its own accumulator.
constexpr DType accumulator_of(DType dtype) {
  return dtype == DType::kFloat16 || dtype == DType::kBFloat16 ? DType::kFloat32 : dtype;
}

}  // namespace pycomm
