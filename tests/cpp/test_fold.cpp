// The fold on every instruction set this processor has: dtypes, ops, sizes, alignment, aliasing,
// and what it refuses. test_fold_floats.cpp has what only floats can get wrong.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "fold_reference.h"
#include "kernels/fold.h"
#include "kernels/fold_dispatch.h"

using namespace fold_test;

TEST(every_dtype_op_count_and_alignment_matches_the_reference) {
  Inputs inputs;
  for (FoldSpec spec : dtype_pairs()) {
    for (ReduceOp op : kOps) {
      if (!can_reduce(spec.source_dtype, op)) continue;
      spec.op = op;
      for (std::size_t k = 1; k <= 5; ++k) {
        // 1, a true division, and a power of two, which is applied as its reciprocal.
        for (std::int64_t divisor : {1, 3, 8}) {
          if (divisor != 1 && !is_scalable(spec.source_dtype)) continue;
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
    if (is_scalable(spec.source_dtype)) spec.divisor = 3;
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

TEST(integers_wrap) {
  std::vector<Bytes> sources{bytes_of(std::vector<std::int32_t>{2147483647, -2147483647 - 1}),
                             bytes_of(std::vector<std::int32_t>{1, -1})};
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    Bytes sum = folded(level, {DType::kInt32, DType::kInt32}, sources, 2, 0);
    CHECK_EQUAL(element<std::int32_t>(sum, 0), std::numeric_limits<std::int32_t>::min());
    CHECK_EQUAL(element<std::int32_t>(sum, 1), std::numeric_limits<std::int32_t>::max());
  }
}

TEST(bools_combine_by_truth_and_come_out_as_0_or_1) {
  const std::vector<Bytes> sources{bytes_of(std::vector<std::uint8_t>{0, 0, 1, 1, 2, 2, 255}),
                                   bytes_of(std::vector<std::uint8_t>{0, 1, 0, 1, 1, 0, 128})};
  struct Case {
    std::vector<ReduceOp> ops;
    std::vector<std::uint8_t> expected;
  };
  const Case cases[] = {
      {{ReduceOp::kSum, ReduceOp::kMax, ReduceOp::kBor}, {0, 1, 1, 1, 1, 1, 1}},
      {{ReduceOp::kProd, ReduceOp::kMin, ReduceOp::kBand}, {0, 0, 0, 1, 1, 0, 1}},
      {{ReduceOp::kBxor}, {0, 1, 1, 0, 0, 1, 0}},
  };
  for (const FoldLevel& level : pycomm::detail::fold_levels()) {
    for (const Case& c : cases) {
      for (ReduceOp op : c.ops) {
        FoldSpec spec{DType::kBool, DType::kBool, op};
        check_same(folded(level, spec, sources, 7, 0), bytes_of(c.expected), spec, level.name);
      }
    }
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

TEST(impossible_folds_are_refused) {
  float value = 1;
  auto* destination = reinterpret_cast<std::byte*>(&value);
  const std::byte* source = destination;
  auto fold_of = [&](FoldSpec spec, std::size_t source_count = 1) {
    pycomm::fold(spec, destination, {&source, source_count}, 1);
  };
  using pycomm::InvalidArgumentError;
  for (DType dtype : {DType::kFloat8E4M3Fn, DType::kFloat8E4M3Fnuz, DType::kFloat8E5M2,
                      DType::kFloat8E5M2Fnuz, DType::kFloat8E8M0Fnu}) {
    CHECK_THROWS(fold_of({dtype, dtype}), InvalidArgumentError, "float8 can only be moved");
  }
  CHECK_THROWS(fold_of({DType::kInt32, DType::kInt32, ReduceOp::kAvg}), InvalidArgumentError,
               "AVG needs a floating or complex dtype");
  CHECK_THROWS(fold_of({DType::kBool, DType::kBool, ReduceOp::kAvg}), InvalidArgumentError,
               "AVG needs a floating or complex dtype");
  CHECK_THROWS(fold_of({DType::kFloat32, DType::kFloat32, ReduceOp::kBxor}), InvalidArgumentError,
               "BXOR needs an integer dtype or bool");
  for (ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProd}) {
    CHECK_THROWS(fold_of({DType::kComplex64, DType::kComplex64, op}), InvalidArgumentError,
                 "complex numbers are folded by SUM and AVG only");
  }
  CHECK_THROWS(fold_of({DType::kComplex64, DType::kFloat32}), InvalidArgumentError,
               "Pass a complex64 destination");
  CHECK_THROWS(fold_of({DType::kInt32, DType::kInt32, ReduceOp::kSum, 2}), InvalidArgumentError,
               "the divisor is 2");
  CHECK_THROWS(fold_of({DType::kInt64, DType::kInt64, ReduceOp::kSum, 1, 0.5}),
               InvalidArgumentError, "prescale 0.5");
  CHECK_THROWS(fold_of({DType::kBool, DType::kBool, ReduceOp::kSum, 1, 1, 2}), InvalidArgumentError,
               "integers and bool are not scaled");
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
               "init: PYCOMM_SIMD=mmx");
}
