#pragma once

#include <algorithm>
#include <cstdint>

#include "collectives/placement.h"
#include "core/operation.h"
#include "kernels/fold.h"

namespace pycomm {

/// The folds of a reduction. Inside one host a single one does it all; between hosts each host
/// folds its ranks (`of_host`) and the hosts' sums are folded to the result (`of_hosts`). Every
/// input is multiplied by `prescale` in the accumulator by the first fold that has one, and the
/// result divided, multiplied by `postscale` and rounded once, by the last.
struct FoldSpecs {
  /// What a host's sum travels as. 16-bit floats are widened by the host's fold; only where every
  /// host has a single rank, whose sum is its input, do they travel as they are.
  DType wire_dtype;
  FoldSpec whole;
  FoldSpec of_host;
  FoldSpec of_hosts;

  static FoldSpecs of(const Operation& operation, const Placement& placement) {
    std::size_t most = 0;
    for (const auto& ranks : placement.hosts) most = std::max(most, ranks.size());
    const bool sums = most > 1;
    const DType dtype = operation.dtype;
    const DType wire = sums ? accumulator_of(dtype) : dtype;
    const std::int64_t divisor = std::max<std::int64_t>(1, operation.divisor);
    const double first = sums ? operation.prescale : 1;
    const double last = sums ? 1 : operation.prescale;
    return {wire,
            {dtype, dtype, operation.op, divisor, operation.prescale, operation.postscale},
            {dtype, wire, operation.op, 1, first, 1},
            {wire, dtype, operation.op, divisor, last, operation.postscale}};
  }
};

}  // namespace pycomm
