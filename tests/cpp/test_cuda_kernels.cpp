// The source of the CUDA kernels, run on the CPU (support/cuda_on_cpu.h), and the functions that
// start them: the same bits as the host's fold, at every alignment and tail, nothing written
// beside. `make test-sanitizers` runs it with address and undefined-behaviour checks.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "fold_reference.h"
#include "support/cuda_on_cpu.h"

using namespace fold_test;
using cuda_on_cpu::CpuLauncher;
using cuda_on_cpu::Order;
using pycomm::InvalidArgumentError;
using pycomm::cuda::copy_segments;
using pycomm::cuda::CopySpec;
using pycomm::cuda::Kernel;
using pycomm::cuda::kMaxSegments;
using pycomm::cuda::kMaxSources;
using pycomm::cuda::Segment;

namespace {

/// The pairs of dtypes that the kernels are made for.
std::vector<FoldSpec> float_pairs() {
  std::vector<FoldSpec> pairs = dtype_pairs();
  std::erase_if(pairs, [](const FoldSpec& spec) { return !is_floating(spec.source_dtype); });
  return pairs;
}

constexpr ReduceOp kFloatOps[] = {ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kMin, ReduceOp::kMax,
                                  ReduceOp::kProd};

/// Counts around a vector, a group, a tile and several tiles.
constexpr std::size_t kCounts[] = {1, 3, 7, 8, 9, 16, 17, 31, 33, 257, 2048, 4097, 13000};

/// Memory that starts `offset` bytes behind a 16-byte boundary and ends with its last element, so
/// that a read or write behind it is one behind an allocation, which the address sanitizer sees.
class Exact {
 public:
  Exact(std::size_t bytes, std::size_t offset)
      : offset_(offset), memory_(offset + bytes, kUntouched) {}
  Exact(const Bytes& content, std::size_t offset) : Exact(content.size(), offset) {
    std::copy(content.begin(), content.end(), data());
  }
  std::byte* data() { return memory_.data() + offset_; }
  Bytes content() const {
    Bytes content(memory_.size() - offset_);
    std::copy(memory_.begin() + offset_, memory_.end(), content.begin());
    return content;
  }
  bool untouched_before() const {
    return std::all_of(memory_.begin(), memory_.begin() + offset_,
                       [](std::byte b) { return b == kUntouched; });
  }

 private:
  static constexpr std::byte kUntouched{0xa5};
  std::size_t offset_;
  Bytes memory_;
};

/// The k+1 offsets of a fold, in elements: all alike, or each its own.
struct Offsets {
  std::size_t first;
  std::size_t step;
  std::size_t of(std::size_t run, DType dtype) const {
    return (first + run * step) * size_of(dtype) % 64;
  }
};
constexpr Offsets kOffsets[] = {{0, 0}, {1, 0}, {5, 0}, {8, 0}, {0, 1}, {3, 2}};

Bytes folded_by_kernel(CpuLauncher& launcher, const FoldSpec& spec,
                       const std::vector<Bytes>& sources, std::size_t count, Offsets offsets) {
  std::vector<Exact> placed;
  std::vector<const void*> pointers;
  placed.reserve(sources.size());
  for (const Bytes& source : sources) {
    placed.emplace_back(source, offsets.of(placed.size(), spec.source_dtype));
    pointers.push_back(placed.back().data());
  }
  Exact destination(count * size_of(spec.destination_dtype),
                    offsets.of(sources.size(), spec.destination_dtype));
  pycomm::cuda::fold(launcher, spec, destination.data(), pointers, count);
  CHECK(destination.untouched_before());
  for (std::size_t s = 0; s < sources.size(); ++s) CHECK(placed[s].content() == sources[s]);
  return destination.content();
}

Bytes folded_by_host(const FoldSpec& spec, const std::vector<Bytes>& sources, std::size_t count) {
  std::vector<const std::byte*> pointers;
  for (const Bytes& source : sources) pointers.push_back(source.data());
  Bytes result(count * size_of(spec.destination_dtype));
  pycomm::fold(spec, result.data(), pointers, count);
  return result;
}

/// What a copy does to one segment, said as a fold of the host.
FoldSpec as_fold(const CopySpec& spec, double scale) {
  return {spec.from_dtype, spec.to_dtype, ReduceOp::kSum, 1, scale};
}

bool all_finite(const Bytes& bytes, DType dtype) {
  for (std::size_t i = 0; i < bytes.size() / size_of(dtype); ++i) {
    const double value =
        dtype == DType::kFloat64 ? element<double>(bytes, i) : load_float(bytes, i, dtype);
    if (!std::isfinite(value)) return false;
  }
  return true;
}

/// `count` elements of value 1.
Bytes ones(DType dtype, std::size_t count) {
  Bytes bytes(count * size_of(dtype));
  for (std::size_t i = 0; i < count; ++i) {
    if (dtype == DType::kFloat64) {
      set_element(bytes, i, 1.0);
    } else {
      store_float(bytes, i, dtype, 1.0f);
    }
  }
  return bytes;
}

}  // namespace

TEST(fold_has_the_bits_of_the_host_at_every_count_and_alignment) {
  Inputs inputs;
  CpuLauncher launcher;
  for (FoldSpec spec : float_pairs()) {
    for (std::size_t count : kCounts) {
      for (std::size_t k : {1, 2, 3, 6}) {
        auto sources = inputs.draw(spec.source_dtype, k, count);
        for (std::int64_t divisor : {1, 3}) {
          if (count > 300 && (divisor == 3) != (k == 3)) continue;
          spec.divisor = divisor;
          const Bytes expected = folded_by_host(spec, sources, count);
          for (Offsets offsets : kOffsets) {
            check_same(folded_by_kernel(launcher, spec, sources, count, offsets), expected, spec,
                       std::to_string(k) + " sources of " + std::to_string(count) + " at " +
                           std::to_string(offsets.first) + "+" + std::to_string(offsets.step));
          }
        }
      }
    }
  }
}

TEST(fold_has_the_bits_of_the_host_for_every_op_divisor_and_factor) {
  Inputs inputs;
  CpuLauncher launcher;
  constexpr std::size_t kCount = 1003;
  for (FoldSpec spec : float_pairs()) {
    for (ReduceOp op : kFloatOps) {
      spec.op = op;
      for (std::size_t k : {2, 5, 33}) {
        auto sources = inputs.draw(spec.source_dtype, k, kCount);
        // A power of two is a reciprocal on the host; 2^53 + 1 rounds in both types.
        for (std::int64_t divisor :
             {std::int64_t{1}, std::int64_t{7}, std::int64_t{64}, (std::int64_t{1} << 53) + 1}) {
          for (auto [prescale, postscale] :
               {std::array{1.0, 1.0}, std::array{0.1, 1.0}, std::array{1e-30, 3e37}}) {
            spec.divisor = divisor;
            spec.prescale = prescale;
            spec.postscale = postscale;
            check_same(folded_by_kernel(launcher, spec, sources, kCount, {0, 0}),
                       folded_by_host(spec, sources, kCount), spec, std::to_string(k));
          }
        }
      }
    }
  }
}

// Also says that fold.h and kernels.h mean the same by "one source".
TEST(every_16_bit_value_widens_and_rounds_back_as_on_the_host) {
  CpuLauncher launcher;
  constexpr std::size_t kCount = 1 << 16;
  std::vector<std::uint16_t> values(kCount);
  for (std::size_t i = 0; i < kCount; ++i) values[i] = static_cast<std::uint16_t>(i);
  for (DType narrow : {DType::kFloat16, DType::kBFloat16}) {
    const FoldSpec widen{narrow, DType::kFloat32};
    const std::vector<Bytes> narrow_bytes{bytes_of(values)};
    const Bytes wide = folded_by_kernel(launcher, widen, narrow_bytes, kCount, {0, 0});
    check_same(wide, folded_by_host(widen, narrow_bytes, kCount), widen, "every value");
    // Each value, its two neighbours, and the ties between it and the next with theirs.
    for (std::int32_t distance : {-1, 0, 1}) {
      for (std::uint32_t tie : {0u, narrow == DType::kFloat16 ? 0x1000u : 0x8000u}) {
        Bytes near = wide;
        for (std::size_t i = 0; i < kCount; ++i) {
          set_element(near, i, element<std::uint32_t>(near, i) + tie + distance);
        }
        const FoldSpec round{DType::kFloat32, narrow};
        check_same(folded_by_kernel(launcher, round, {near}, kCount, {0, 0}),
                   folded_by_host(round, {near}, kCount), round, "near every value");
      }
    }
  }
}

TEST(float32_of_every_exponent_rounds_as_on_the_host) {
  CpuLauncher launcher;
  std::vector<std::uint32_t> bits;
  for (std::uint64_t b = 0; b <= 0xffffffffu; b += 19997) bits.push_back(std::uint32_t(b));
  for (DType narrow : {DType::kFloat16, DType::kBFloat16}) {
    const FoldSpec spec{DType::kFloat32, narrow};
    check_same(folded_by_kernel(launcher, spec, {bytes_of(bits)}, bits.size(), {0, 0}),
               folded_by_host(spec, {bytes_of(bits)}, bits.size()), spec, "every 19997th");
  }
}

TEST(the_destination_of_a_fold_may_be_any_source_of_its_dtype) {
  Inputs inputs;
  for (FoldSpec spec : float_pairs()) {
    if (spec.source_dtype != spec.destination_dtype) continue;
    for (Order order : {Order::kForward, Order::kBackward, Order::kShuffled}) {
      CpuLauncher launcher(order);
      auto sources = inputs.draw(spec.source_dtype, 3, 5000);
      const Bytes expected = folded_by_host(spec, sources, 5000);
      for (std::size_t aliased = 0; aliased < sources.size(); ++aliased) {
        std::vector<Bytes> memory = sources;
        std::vector<const void*> pointers;
        for (const Bytes& source : memory) pointers.push_back(source.data());
        pycomm::cuda::fold(launcher, spec, memory[aliased].data(), pointers, 5000);
        check_same(memory[aliased], expected, spec, "into source " + std::to_string(aliased));
      }
    }
  }
}

TEST(as_many_sources_as_a_launch_takes_are_folded_in_order) {
  Inputs inputs;
  CpuLauncher launcher;
  for (FoldSpec spec : float_pairs()) {
    spec.divisor = kMaxSources;
    auto sources = inputs.draw(spec.source_dtype, kMaxSources, 20);
    check_same(folded_by_kernel(launcher, spec, sources, 20, {0, 0}),
               folded_by_host(spec, sources, 20), spec, "all");
  }
  CHECK_EQUAL(launcher.launches, float_pairs().size());
}

TEST(a_copy_has_the_bits_of_the_host_at_every_count_and_alignment) {
  Inputs inputs;
  CpuLauncher launcher;
  for (const FoldSpec& pair : float_pairs()) {
    CopySpec spec{pair.source_dtype, pair.destination_dtype};
    for (double scale : {1.0, 1.0 / 3, 65536.0}) {
      spec.scale = scale;
      for (std::size_t count : kCounts) {
        auto source = inputs.draw(spec.from_dtype, 1, count);
        const Bytes expected = folded_by_host(as_fold(spec, scale), source, count);
        for (Offsets offsets : kOffsets) {
          Exact from(source[0], offsets.of(0, spec.from_dtype));
          Exact to(expected.size(), offsets.of(1, spec.to_dtype));
          const Segment segment{from.data(), to.data(), count};
          copy_segments(launcher, spec, {&segment, 1});
          check_same(to.content(), expected, as_fold(spec, scale), std::to_string(count));
          CHECK(to.untouched_before());
          CHECK(from.content() == source[0]);
        }
      }
    }
  }
}

TEST(a_bucket_of_many_gradients_is_packed_and_unpacked) {
  Inputs inputs;
  for (Order order : {Order::kForward, Order::kBackward, Order::kShuffled}) {
    for (const FoldSpec& pair : float_pairs()) {
      // More than two launches, with empty ones, gaps of odd length between, sizes of all kinds.
      constexpr std::size_t kGradients = 2 * kMaxSegments + 11;
      const std::size_t from_bytes = size_of(pair.source_dtype);
      const std::size_t to_bytes = size_of(pair.destination_dtype);
      std::vector<Bytes> gradients;
      std::vector<std::size_t> offsets;
      std::size_t bucket_count = 0;
      for (std::size_t g = 0; g < kGradients; ++g) {
        std::size_t count = inputs.below(100);
        if (g % 7 == 0) count = 0;
        if (g % 41 == 5) count = 3000 + inputs.below(9000);
        gradients.push_back(inputs.draw(pair.source_dtype, 1, count)[0]);
        bucket_count += inputs.below(3);
        offsets.push_back(bucket_count);
        bucket_count += count;
      }
      Exact bucket(bucket_count * to_bytes, 0);
      Bytes expected = bucket.content();
      std::vector<Segment> segments;
      CopySpec pack{pair.source_dtype, pair.destination_dtype, 0.125};
      for (std::size_t g = 0; g < kGradients; ++g) {
        const std::size_t count = gradients[g].size() / from_bytes;
        segments.push_back({gradients[g].data(), bucket.data() + offsets[g] * to_bytes, count});
        const Bytes one = folded_by_host(as_fold(pack, 0.125), {gradients[g]}, count);
        std::copy(one.begin(), one.end(), expected.begin() + offsets[g] * to_bytes);
      }
      CpuLauncher launcher(order);
      copy_segments(launcher, pack, segments);
      check_same(bucket.content(), expected, pair, "packed");
      CHECK_EQUAL(launcher.launches, 2);  // the empty seventh leaves two launches full at most

      if (from_bytes != to_bytes) continue;  // the way back of a conversion is another pair's
      std::vector<Bytes> unpacked;
      for (const Bytes& gradient : gradients) unpacked.emplace_back(gradient.size());
      for (std::size_t g = 0; g < kGradients; ++g) {
        segments[g].from = bucket.data() + offsets[g] * to_bytes;
        segments[g].to = unpacked[g].data();
      }
      copy_segments(launcher, {pack.to_dtype, pack.from_dtype, 8}, segments);
      for (std::size_t g = 0; g < kGradients; ++g) {
        const std::size_t count = gradients[g].size() / from_bytes;
        const Bytes one = folded_by_host(as_fold(pack, 0.125), {gradients[g]}, count);
        check_same(unpacked[g], folded_by_host(as_fold(pack, 8), {one}, count), pair, "unpacked");
      }
    }
  }
}

TEST(the_scale_may_lie_on_the_device) {
  Inputs inputs;
  CpuLauncher launcher;
  for (const FoldSpec& pair : float_pairs()) {
    auto source = inputs.draw(pair.source_dtype, 1, 1000);
    // 1 counts as a factor there: the host cannot know it, so NaNs are made quiet.
    for (float scale : {1.0f, 1 / 1024.0f, 0.3f}) {
      CopySpec spec{pair.source_dtype, pair.destination_dtype, 5.0, &scale};
      Bytes to(1000 * size_of(pair.destination_dtype));
      const Segment segment{source[0].data(), to.data(), 1000};
      copy_segments(launcher, spec, {&segment, 1});
      // Two equal sources and MAX make the host compute even where scale is 1.
      FoldSpec host{pair.source_dtype, pair.destination_dtype, ReduceOp::kMax, 1, scale};
      check_same(to, folded_by_host(host, {source[0], source[0]}, 1000), host, "device_scale");
    }
  }
}

TEST(one_infinity_or_nan_anywhere_is_found) {
  CpuLauncher launcher;
  constexpr std::size_t kCount = 300;
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float half = 0.5f;
  for (const FoldSpec& pair : float_pairs()) {
    if (pair.source_dtype != pair.destination_dtype) continue;
    const DType dtype = pair.source_dtype;
    for (std::size_t offset : {0, 1}) {
      float found = 0;
      Exact gradients(ones(dtype, kCount), offset * size_of(dtype));
      const Segment in_place{gradients.data(), gradients.data(), kCount};
      const CopySpec spec{dtype, dtype, 1, &half, &found};
      copy_segments(launcher, spec, {&in_place, 1});
      CHECK_EQUAL(found, 0.0f);
      for (std::size_t i = 0; i < kCount; ++i) {
        for (float bad : {infinity, -infinity, nan}) {
          Bytes poisoned = ones(dtype, kCount);
          if (dtype == DType::kFloat64) {
            set_element(poisoned, i, static_cast<double>(bad));
          } else {
            store_float(poisoned, i, dtype, bad);
          }
          std::copy(poisoned.begin(), poisoned.end(), gradients.data());
          found = 0;
          copy_segments(launcher, spec, {&in_place, 1});
          CHECK_EQUAL(found, 1.0f);
        }
      }
      // What was found stays so: several calls share one flag.
      const Bytes fine = ones(dtype, kCount);
      std::copy(fine.begin(), fine.end(), gradients.data());
      copy_segments(launcher, spec, {&in_place, 1});
      CHECK_EQUAL(found, 1.0f);
    }
  }
}

TEST(the_finite_check_is_of_what_is_written) {
  Inputs inputs;
  CpuLauncher launcher;
  for (const FoldSpec& pair : float_pairs()) {
    for (std::size_t count : {1, 2, 3, 12}) {  // short enough to be finite often
      for (int draw = 0; draw < 30; ++draw) {
        for (double scale : {1.0, 0.25, 1e5}) {
          auto source = inputs.draw(pair.source_dtype, 1, count);
          Bytes to(count * size_of(pair.destination_dtype));
          float found = 0;
          const CopySpec spec{pair.source_dtype, pair.destination_dtype, scale, nullptr, &found};
          const Segment segment{source[0].data(), to.data(), count};
          copy_segments(launcher, spec, {&segment, 1});
          const bool finite = all_finite(to, pair.destination_dtype);
          CHECK_EQUAL(found, finite ? 0.0f : 1.0f);
          if (!all_finite(source[0], pair.source_dtype)) CHECK(!finite);
        }
      }
    }
  }
}

TEST(nothing_is_launched_for_nothing) {
  CpuLauncher launcher;
  float value = 2;
  const void* source = &value;
  copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, {});
  const Segment empty[] = {{nullptr, nullptr, 0}, {&value, &value, 0}};
  copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, empty);
  pycomm::cuda::fold(launcher, {DType::kFloat32, DType::kFloat32}, nullptr, {&source, 1}, 0);
  pycomm::cuda::fold(launcher, {DType::kFloat32, DType::kFloat32}, &value, {&source, 1}, 1);
  CHECK_EQUAL(launcher.launches, 0);
}

TEST(a_launch_has_a_block_for_each_tile) {
  CpuLauncher launcher;
  for (std::size_t count : {1, 4096, 4097, 40960}) {
    std::vector<float> from(count + 1);
    std::vector<float> to(count + 1);
    const std::uint64_t blocks = launcher.blocks;
    const Segment aligned{from.data(), to.data(), count};
    const Segment apart{from.data() + 1, to.data(), count};  // never on a boundary together
    copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, {&aligned, 1});
    copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, {&apart, 1});
    // What is left of whole vectors does not need a block of its own.
    CHECK_EQUAL(launcher.blocks - blocks,
                std::max<std::size_t>(count / 4096, 1) + (count + 4095) / 4096);
  }
}

TEST(a_failed_launch_is_passed_on) {
  struct Failing final : pycomm::cuda::Launcher {
    void launch(Kernel, std::uint32_t, const void*) override {
      throw pycomm::CommError("no kernel image");
    }
  } launcher;
  float from = 1;
  float to = 0;
  const Segment segment{&from, &to, 1};
  CHECK_THROWS(copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, {&segment, 1}),
               pycomm::CommError, "no kernel image");
}

TEST(impossible_copies_are_refused_before_anything_is_launched) {
  CpuLauncher launcher;
  alignas(16) std::array<std::byte, 256> memory{};
  auto copy = [&](DType from, DType to, Segment segment) {
    const Segment segments[] = {{memory.data(), memory.data() + 128, 1}, segment};
    copy_segments(launcher, {from, to}, segments);
  };
  const Segment good{memory.data(), memory.data() + 128, 4};
  CHECK_THROWS(copy(DType::kFloat16, DType::kBFloat16, good), InvalidArgumentError,
               "copy of float16 segments to bfloat16");
  CHECK_THROWS(copy(DType::kInt32, DType::kInt32, good), InvalidArgumentError, "int32");
  CHECK_THROWS(copy(DType::kFloat64, DType::kFloat32, good), InvalidArgumentError, "float64");
  CHECK_THROWS(copy(DType::kFloat32, DType::kFloat32, {memory.data() + 2, memory.data() + 128, 4}),
               InvalidArgumentError, "segment 1: `from` is 2 bytes behind");
  CHECK_THROWS(copy(DType::kFloat32, DType::kFloat16, {memory.data(), memory.data() + 129, 4}),
               InvalidArgumentError, "`to` is 1 bytes behind");
  CHECK_THROWS(copy(DType::kFloat32, DType::kFloat32, {nullptr, memory.data(), 4}),
               InvalidArgumentError, "`from` is null");
  CHECK_THROWS(copy(DType::kFloat32, DType::kFloat32, {memory.data(), memory.data() + 12, 4}),
               InvalidArgumentError, "overlaps");
  CHECK_THROWS(copy(DType::kFloat32, DType::kFloat16, {memory.data(), memory.data(), 4}),
               InvalidArgumentError, "overlaps");
  CHECK_EQUAL(launcher.launches, 0);
}

TEST(impossible_folds_are_refused_before_anything_is_launched) {
  CpuLauncher launcher;
  alignas(16) std::array<std::byte, 256> memory{};
  auto fold_into = [&](FoldSpec spec, std::size_t destination, std::size_t source_count = 2) {
    std::vector<const void*> sources(source_count, memory.data());
    pycomm::cuda::fold(launcher, spec, memory.data() + destination, sources, 4);
  };
  const FoldSpec good{DType::kFloat32, DType::kFloat32};
  CHECK_THROWS(fold_into({DType::kInt32, DType::kInt32}, 64), InvalidArgumentError, "int32");
  CHECK_THROWS(fold_into({DType::kFloat32, DType::kFloat32, ReduceOp::kBand}, 64),
               InvalidArgumentError, "BAND needs an integer dtype");
  CHECK_THROWS(fold_into({DType::kFloat32, DType::kFloat32, ReduceOp::kAvg, 0}, 64),
               InvalidArgumentError, "the divisor is 0");
  CHECK_THROWS(fold_into(good, 64, 0), InvalidArgumentError, "at least one source");
  CHECK_THROWS(fold_into(good, 64, kMaxSources + 1), InvalidArgumentError, "at most 480");
  CHECK_THROWS(fold_into(good, 66), InvalidArgumentError, "the destination is 2 bytes behind");
  CHECK_THROWS(fold_into(good, 8), InvalidArgumentError, "the destination overlaps source 0");
  CHECK_THROWS(fold_into({DType::kFloat32, DType::kBFloat16}, 0), InvalidArgumentError, "overlaps");
  CHECK_EQUAL(launcher.launches, 0);
}

TEST(every_kernel_has_a_name_of_its_own) {
  auto names = pycomm::cuda::kernel_names();
  const auto last = static_cast<std::size_t>(Kernel::kFoldFloat64ToFloat64);
  CHECK_EQUAL(names.size(), last + 1);
  CHECK_EQUAL(std::set<std::string_view>(names.begin(), names.end()).size(), names.size());
  CHECK_EQUAL(names[static_cast<std::size_t>(Kernel::kCopyFloat16ToFloat32)],
              "pycomm_copy_float16_to_float32");
  CHECK_EQUAL(names[last], "pycomm_fold_float64_to_float64");
}
