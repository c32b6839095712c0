#pragma once

#include <cstddef>
#include <span>

#include "kernels/fold.h"

namespace pycomm::detail {

/// One fold, already checked, as it is handed to an instruction set. Plain pointers, because the
/// code that reads this is compiled for newer processors and must not instantiate any template or
/// inline function that the rest of the program shares: the linker keeps one copy of those, and
/// would be free to keep the one that an older processor cannot run.
struct FoldCall {
  FoldSpec spec;
  const std::byte* const* sources;
  std::size_t source_count;
  std::byte* const* destinations;
  std::size_t destination_count;
  std::size_t count;
};

/// fold_impl.h, compiled once for each instruction set.
void fold_baseline(const FoldCall& call);
#if defined(__x86_64__)
void fold_avx2(const FoldCall& call);
void fold_avx512(const FoldCall& call);
#endif

struct FoldLevel {
  const char* name;
  void (*fold)(const FoldCall& call);
};

/// The instruction sets that this build has and this processor runs; the fastest first, "baseline"
/// last.
std::span<const FoldLevel> fold_levels();

/// The level that `PYCOMM_SIMD=wanted` asks for; the fastest if that is null or empty.
/// @throws InvalidArgumentError  `wanted` is not one of fold_levels().
const FoldLevel& choose_fold_level(const char* wanted);

/// fold_to_all() on one of fold_levels().
void fold_to_all_at(const FoldLevel& level, const FoldSpec& spec,
                    std::span<std::byte* const> destinations,
                    std::span<const std::byte* const> sources, std::size_t count);

}  // namespace pycomm::detail
