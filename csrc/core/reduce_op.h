#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace pycomm {

/// How a reduction combines two elements. The numbers travel in signatures, so they never change.
enum class ReduceOp : std::uint8_t {
  kSum = 0,
  kAvg = 1,
  kMin = 2,
  kMax = 3,
  kProd = 4,
  kBand = 5,
  kBor = 6,
  kBxor = 7,
};

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
    case ReduceOp::kBand:
      return "BAND";
    case ReduceOp::kBor:
      return "BOR";
    case ReduceOp::kBxor:
      return "BXOR";
  }
  return "unknown op";
}

/// Whether elements of `dtype` can be combined by `op`. bool combines as torch's bool tensors do
/// (SUM, MAX and BOR are "or"; PROD, MIN and BAND are "and"); AVG needs something to divide;
/// complex numbers have no order, no bits, and here no product; float8 only moves.
constexpr bool can_reduce(DType dtype, ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return !is_float8(dtype);
    case ReduceOp::kAvg:
      return is_scalable(dtype);
    case ReduceOp::kMin:
    case ReduceOp::kMax:
    case ReduceOp::kProd:
      return !is_complex(dtype) && !is_float8(dtype);
    case ReduceOp::kBand:
    case ReduceOp::kBor:
    case ReduceOp::kBxor:
      return is_integer(dtype) || dtype == DType::kBool;
  }
  return false;
}

}  // namespace pycomm
