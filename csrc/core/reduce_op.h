#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pycomm {

/// How a reduction combines two elements. The numbers travel in signatures, so they never change.
enum class ReduceOp : std::uint8_t { kSum = 0, kAvg = 1, kMin = 2, kMax = 3, kProd = 4 };

constexpr const char* name_of(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return "SUM";
    case ReduceOp::kAvg:
      return "AVG";
    case ReduceOp::kMin:
      return "MIN";
    case ReduceOp::kMax:
      return "MAX";
    case ReduceOp::kProd:
      return "PROD";
  }
  return "unknown op";
}

/// Whether elements of `dtype` can be combined by `op`: bool only moves, AVG needs a float.
constexpr bool can_reduce(DType dtype, ReduceOp op) {
  return dtype != DType::kBool && (op != ReduceOp::kAvg || is_floating(dtype));
}

}  // namespace pycomm
