// What only floats can get wrong in a fold: rounding, NaN, signed zero, scale, the thread's modes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "fold_reference.h"
#include "kernels/fold.h"
#include "kernels/fold_dispatch.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

using namespace fold_test;

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

TEST(factors_match_the_reference) {
  Inputs inputs;
  struct Factors {
    double prescale;
    double postscale;
  };
  // Inexact in every type; one of each alone; beyond float32's range, and 1 once rounded to it.
  const Factors kFactors[] = {{0.1, -3.3}, {1 / 3.0, 1}, {1, 1e-3}, {1e39, 1e-320}, {1 + 1e-12, 1}};
  for (FoldSpec spec : dtype_pairs()) {
    if (!is_scalable(spec.source_dtype)) continue;
    for (ReduceOp op : kOps) {
      if (!can_reduce(spec.source_dtype, op)) continue;
      spec.op = op;
      for (Factors factors : kFactors) {
        spec.prescale = factors.prescale;
        spec.postscale = factors.postscale;
        for (std::size_t k = 1; k <= 4; ++k) {
          for (std::int64_t divisor : {1, 3, 8}) {
            spec.divisor = divisor;
            for (std::size_t count : {0, 1, 31, 333}) {
              auto sources = inputs.draw(spec.source_dtype, k, count);
              Bytes expected = reference(spec, sources, count);
              for (const FoldLevel& level : pycomm::detail::fold_levels()) {
                for (std::size_t offset : {0, 1, 8}) {
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
}

TEST(a_scaled_buffer_may_be_cut_and_overwritten) {
  Inputs inputs;
  constexpr std::size_t kCount = 777;
  for (FoldSpec spec : dtype_pairs()) {
    if (!is_scalable(spec.source_dtype) || spec.source_dtype != spec.destination_dtype) continue;
    spec.prescale = 0.7;
    spec.divisor = 3;
    spec.postscale = 1.1;
    const std::size_t size = size_of(spec.source_dtype);
    auto sources = inputs.draw(spec.source_dtype, 2, kCount);
    Bytes expected = reference(spec, sources, kCount);
    for (const FoldLevel& level : pycomm::detail::fold_levels()) {
      std::vector<Bytes> memory = sources;
      for (std::size_t i = 0; i < kCount;) {
        std::size_t piece = std::min(1 + inputs.below(200), kCount - i);
        std::byte* const to[] = {memory[0].data() + i * size, memory[1].data() + i * size};
        const std::byte* const from[] = {to[0], to[1]};
        fold_to_all_at(level, spec, to, from, piece);
        i += piece;
      }
      for (const Bytes& result : memory) check_same(result, expected, spec, level.name);
    }
  }
}

TEST(factors_do_not_overflow_or_vanish_in_16_bits) {
  // 65504 is the largest float16: its double fits before the one rounding only in float32.
  std::vector<Bytes> sources(2, bytes_of(std::vector<std::uint16_t>{encode(kBinary16, 65504)}));
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes sum = folded(level, {DType::kFloat16, DType::kFloat16, ReduceOp::kSum, 1, 4, 0.125},
                       sources, 1, 0);
    CHECK_EQUAL(decode(kBinary16, element<std::uint16_t>(sum, 0)), 65504.0f);
  }
}

TEST(complex_numbers_scale_by_reals_and_keep_the_component_that_is_no_nan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<Bytes> sources{bytes_of(std::vector<float>{1, -nan, -0.0f, 5}),
                             bytes_of(std::vector<float>{2, 7, -0.0f, 4})};
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes result = folded(level, {DType::kComplex64, DType::kComplex64, ReduceOp::kAvg, 2, 4, 0.5},
                          sources, 2, 0);
    CHECK_EQUAL(element<float>(result, 0), 3.0f);
    CHECK_EQUAL(element<std::uint32_t>(result, 1), 0x7fc00000u);
    CHECK_EQUAL(element<std::uint32_t>(result, 2), 0x80000000u);
    CHECK_EQUAL(element<float>(result, 3), 9.0f);
  }
}

#if defined(__x86_64__)
TEST(the_threads_floating_point_modes_neither_matter_nor_change) {
  Inputs inputs;
  constexpr std::size_t kCount = 1000;
  // Round up, flush subnormal results to zero, and read subnormals as zero.
  constexpr unsigned kUnusual = 0x1f80 | 0x4000 | 0x8000 | 0x0040;
  for (FoldSpec spec : dtype_pairs()) {
    if (!is_scalable(spec.source_dtype)) continue;
    spec.divisor = 3;
    spec.prescale = 0.1;
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
