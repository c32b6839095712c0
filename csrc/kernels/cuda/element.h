#pragma once

// How elements lie in memory: each format widens one to its accumulator and rounds it back, as the
// formats of kernels/fold_impl.h do. Included by kernels.cu alone.

#include <cstdint>

namespace pycomm::cuda {

// The two conversions that a GPU has an instruction for and C++ no words. Elsewhere they are
// arithmetic; that the instructions do the same is IEEE 754's definition of a conversion (PTX ISA,
// cvt: exact, or rounded to nearest even, subnormals kept), not something that a CPU can test.

__device__ inline float float16_to_float32(std::uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#else
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t fraction = bits & 0x3ffu;
  // A subnormal counts 2^-24; anything else has its exponent rebased by 127 - 15.
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const std::uint32_t wide = exponent == 0x1fu ? 0xffu : exponent + 112;
  return __builtin_bit_cast(float, sign | wide << 23 | fraction << 13);
#endif
}

/// `value` is not NaN.
__device__ inline std::uint16_t float32_to_float16(float value) {
#if defined(__CUDA_ARCH__)
  std::uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
#else
  const std::uint32_t bits = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t rounded;
  if (magnitude >= 0x47800000u) {  // 2^16, beyond every finite one
    rounded = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14, the smallest normal; may carry into infinity
    const std::uint32_t rebased = magnitude - (112u << 23);
    rounded = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
  } else {  // the last place of 0.5 is 2^-24, the unit of subnormals: the addition rounds to it
    const float sum = __builtin_bit_cast(float, magnitude) + 0.5f;
    rounded = __builtin_bit_cast(std::uint32_t, sum) - 0x3f000000u;
  }
  return static_cast<std::uint16_t>(sign | rounded);
#endif
}

// narrow() rounds to nearest even and makes every NaN the one positive quiet NaN of its type.

struct Float64 {
  using Bits = std::uint64_t;
  using Accumulator = double;
  static constexpr Bits kInfinity = 0x7ff0000000000000;

  static __device__ double widen(Bits bits) { return __builtin_bit_cast(double, bits); }
  static __device__ Bits narrow(double value) {
    return value == value ? __builtin_bit_cast(Bits, value) : 0x7ff8000000000000;
  }
};

struct Float32 {
  using Bits = std::uint32_t;
  using Accumulator = float;
  static constexpr Bits kInfinity = 0x7f800000;

  static __device__ float widen(Bits bits) { return __builtin_bit_cast(float, bits); }
  static __device__ Bits narrow(float value) {
    return value == value ? __builtin_bit_cast(Bits, value) : 0x7fc00000;
  }
};

struct BFloat16 {
  using Bits = std::uint16_t;
  using Accumulator = float;
  static constexpr Bits kInfinity = 0x7f80;

  static __device__ float widen(Bits bits) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }
  /// Adding just under half of the last kept place carries exactly when it should; the quiet NaN
  /// does not carry.
  static __device__ Bits narrow(float value) {
    const std::uint32_t bits = Float32::narrow(value);
    return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  using Accumulator = float;
  static constexpr Bits kInfinity = 0x7c00;

  static __device__ float widen(Bits bits) { return float16_to_float32(bits); }
  static __device__ Bits narrow(float value) {
    return value == value ? float32_to_float16(value) : Bits{0x7e00};
  }
};

/// Infinity's bits are those of the exponent.
template <typename Format>
__device__ bool is_finite(typename Format::Bits bits) {
  return (bits & Format::kInfinity) != Format::kInfinity;
}

}  // namespace pycomm::cuda
