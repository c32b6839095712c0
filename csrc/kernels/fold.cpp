#include "kernels/fold.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>

#include "core/error.h"
#include "kernels/fold_dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace pycomm {
namespace detail {
namespace {

#if defined(__x86_64__)
bool has_f16c() {
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

/// Round to nearest with subnormals kept while it lives. Rounding and flushing to zero are settings
/// of a thread (torch.set_flush_denormal), so without this the bits of a sum would depend on which
/// thread happened to fold it.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) {
    if ((saved_ & ~kStatusFlags) != kDefault) _mm_setcsr(kDefault);
  }
  ~DefaultFloatingPoint() {
    if ((saved_ & ~kStatusFlags) != kDefault) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kStatusFlags = 0x3f;
  static constexpr unsigned kDefault = 0x1f80;  // all exceptions masked
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ != 0) asm volatile("msr fpcr, %0" ::"r"(std::uint64_t{0}));
  }
  ~DefaultFloatingPoint() {
    if (saved_ != 0) asm volatile("msr fpcr, %0" ::"r"(saved_));
  }

 private:
  std::uint64_t saved_;
#else
#error "pycomm folds on x86-64 and AArch64; add this architecture's floating-point control here"
#endif

 public:
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
};

bool can_convert(DType source, DType destination) {
  return destination == source || destination == accumulator_of(source) ||
         source == accumulator_of(destination);
}

std::string describe(const FoldSpec& spec, std::size_t source_count) {
  return "fold of " + std::to_string(source_count) + " " + name_of(spec.source_dtype) +
         " sources by " + name_of(spec.op) + " into " + name_of(spec.destination_dtype);
}

bool is_bitwise(ReduceOp op) {
  return op == ReduceOp::kBand || op == ReduceOp::kBor || op == ReduceOp::kBxor;
}

/// Why can_reduce() says no, and what helps.
std::string why_not(const FoldSpec& spec) {
  if (is_float8(spec.source_dtype)) return "float8 can only be moved. Convert it to bfloat16.";
  if (is_bitwise(spec.op)) {
    return std::string(name_of(spec.op)) + " needs an integer dtype or bool. Convert to one.";
  }
  if (is_complex(spec.source_dtype)) {
    return "complex numbers are folded by SUM and AVG only. Fold their real and imaginary parts.";
  }
  return "AVG needs a floating or complex dtype. Use SUM, or convert to one.";
}

void check(const FoldSpec& spec, std::size_t source_count) {
  auto refuse = [&](const std::string& why) {
    throw InvalidArgumentError(describe(spec, source_count) + ": " + why);
  };
  if (source_count == 0) refuse("there is nothing to fold. Pass at least one source.");
  if (!can_reduce(spec.source_dtype, spec.op)) refuse(why_not(spec));
  if (!can_convert(spec.source_dtype, spec.destination_dtype)) {
    refuse(std::string("a fold keeps its dtype or converts to or from its accumulator. Pass a ") +
           name_of(spec.source_dtype) + " destination.");
  }
  if (spec.divisor < 1) {
    refuse("the divisor is " + std::to_string(spec.divisor) + ". Pass a positive one.");
  }
  if (!is_scalable(spec.source_dtype) &&
      (spec.divisor != 1 || spec.prescale != 1 || spec.postscale != 1)) {
    refuse("the divisor is " + std::to_string(spec.divisor) + ", prescale " +
           std::to_string(spec.prescale) + " and postscale " + std::to_string(spec.postscale) +
           ", and integers and bool are not scaled. Pass 1 for each.");
  }
}

/// What combines alike is folded as one dtype: a complex number as its two components, and for an
/// op that works on bits any integer as its bytes. Rewrites `spec`; returns how many elements of
/// its new dtype make one of the old.
std::size_t reduce_to_parts(FoldSpec& spec) {
  const DType whole = spec.source_dtype;
  DType part = whole;
  if (whole == DType::kComplex64) part = DType::kFloat32;
  if (whole == DType::kComplex128) part = DType::kFloat64;
  if (is_integer(whole) && is_bitwise(spec.op)) part = DType::kUint8;
  if (part == whole) return 1;
  spec.source_dtype = part;
  spec.destination_dtype = part;
  return size_of(whole) / size_of(part);
}

std::span<const FoldLevel> supported_levels() {
  static constexpr FoldLevel kLevels[] = {
#if defined(__x86_64__)
      {"avx512", fold_avx512},
      {"avx2", fold_avx2},
#endif
      {"baseline", fold_baseline},
  };
  std::span<const FoldLevel> levels = kLevels;
#if defined(__x86_64__)
  if (has_avx512()) return levels;
  if (has_avx2()) return levels.subspan(1);
  return levels.subspan(2);
#else
  return levels;
#endif
}

/// Chosen at the first call and kept.
const FoldLevel& chosen_level() {
  static const FoldLevel& level = choose_fold_level(std::getenv("PYCOMM_SIMD"));
  return level;
}

}  // namespace

std::span<const FoldLevel> fold_levels() {
  static const std::span<const FoldLevel> levels = supported_levels();
  return levels;
}

const FoldLevel& choose_fold_level(const char* wanted) {
  if (wanted == nullptr || *wanted == '\0') return fold_levels().front();
  std::string names;
  for (const FoldLevel& level : fold_levels()) {
    if (std::string_view(level.name) == wanted) return level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  throw InvalidArgumentError(std::string("init: PYCOMM_SIMD=") + wanted +
                             ": this processor and build have " + names +
                             ". Set it to one of those, or unset it for the fastest.");
}

void fold_to_all_at(const FoldLevel& level, const FoldSpec& spec,
                    std::span<std::byte* const> destinations,
                    std::span<const std::byte* const> sources, std::size_t count) {
  check(spec, sources.size());
  if (count == 0) return;
  const bool copies = sources.size() == 1 && spec.source_dtype == spec.destination_dtype &&
                      spec.divisor == 1 && spec.prescale == 1 && spec.postscale == 1;
  if (copies) {
    for (std::byte* destination : destinations) {
      if (destination == sources[0]) continue;
      std::memcpy(destination, sources[0], count * size_of(spec.source_dtype));
    }
    return;
  }
  FoldSpec parts = spec;
  count *= reduce_to_parts(parts);
  DefaultFloatingPoint default_floating_point;
  level.fold(
      {parts, sources.data(), sources.size(), destinations.data(), destinations.size(), count});
}

}  // namespace detail

void fold(const FoldSpec& spec, std::byte* destination, std::span<const std::byte* const> sources,
          std::size_t count) {
  fold_to_all(spec, {&destination, 1}, sources, count);
}

void fold_to_all(const FoldSpec& spec, std::span<std::byte* const> destinations,
                 std::span<const std::byte* const> sources, std::size_t count) {
  detail::fold_to_all_at(detail::chosen_level(), spec, destinations, sources, count);
}

const char* simd_level() { return detail::chosen_level().name; }

}  // namespace pycomm
