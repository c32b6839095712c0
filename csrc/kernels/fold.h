#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycomm {

/// What a fold does:
///
///   destination[i] = round(op(... op(prescale * sources[0][i], prescale * sources[1][i]) ...)
///                          / divisor * postscale)
///
/// All but `round` is computed in the accumulator's type, each operation rounded to it.
struct FoldSpec {
  DType source_dtype;
  /// `source_dtype`, or its accumulator (a host's partial sum), or, when `source_dtype` is an
  /// accumulator, the 16-bit type it is finally rounded to.
  DType destination_dtype;
  /// kAvg folds like kSum; the division is by `divisor` alone.
  ReduceOp op = ReduceOp::kSum;
  /// Divides once, after the last source. Floating and complex dtypes only, as are the factors.
  std::int64_t divisor = 1;
  /// Multiplies every source element as it is read. Both factors are first rounded to the
  /// accumulator's type.
  double prescale = 1;
  /// Multiplies the quotient.
  double postscale = 1;
};

/// Fold `count` elements of k sources, strictly in the order given, into `destination`.
///
/// Every element is computed by the same sequence of operations whatever `count`, the alignment or
/// the instruction set, so a buffer may be cut anywhere: the bits do not change. 16-bit floats are
/// widened to float32, folded, scaled, and rounded once to nearest even. Complex numbers are folded
/// as pairs of reals; divisor and factors are real. MIN and MAX return NaN if any source is NaN,
/// and of two equal elements (0.0 and -0.0) the later. Integer sums and products wrap. A bool is
/// combined as can_reduce() says; a byte that is neither 0 nor 1 counts as true, and the result is
/// 0 or 1. A NaN that is computed or converted becomes the one positive quiet NaN of its type
/// (each component of a complex number for itself), since which NaN an addition passes on is for
/// the compiler to choose. The calling thread's rounding and flush-to-zero modes have no effect.
///
/// `destination` may be any of the sources, exactly, unless the fold widens; other overlap is not
/// allowed. No pointer need be aligned. k >= 1; k == 1 converts and scales. Where there is nothing
/// of either to do it copies bytes: NaNs keep their payload, a bool its byte.
///
/// Cost: k reads and one write per element, in one pass; no memory is allocated.
/// @throws InvalidArgumentError  no source, an op that can_reduce() denies the dtype (float8: every
///         op), a divisor below 1, a divisor or factor for integers or bool, or a destination dtype
///         other than those of FoldSpec.
void fold(const FoldSpec& spec, std::byte* destination, std::span<const std::byte* const> sources,
          std::size_t count);

/// The same fold, its result written to every one of `destinations` (each may be a source), in the
/// same pass.
void fold_to_all(const FoldSpec& spec, std::span<std::byte* const> destinations,
                 std::span<const std::byte* const> sources, std::size_t count);

/// The instruction set chosen at run time: "avx512", "avx2", "baseline".
/// `PYCOMM_SIMD=baseline|avx2|avx512` lowers the choice; it is read once, by the first fold or
/// here.
/// @throws InvalidArgumentError  PYCOMM_SIMD names none that this processor and build have.
const char* simd_level();

}  // namespace pycomm
