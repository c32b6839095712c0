#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "core/dtype.h"
#include "core/reduce_op.h"

namespace pycomm {

/// Kinds of collective. The numbers travel in signatures, so they never change.
enum class Kind : std::uint8_t {
  kBarrier = 0,
  kAllReduce = 1,
  kBroadcast = 2,
  kAllGather = 3,
  kShutdown = 4,
};

/// Between hosts; inside one host there is a single all-reduce.
enum class Algorithm : std::uint8_t { kAuto = 0, kDirect = 1, kRing = 2 };

/// A tensor's shape. Beyond kMaxDims dimensions the last entry is a hash over all that remain.
struct Shape {
  static constexpr int kMaxDims = 8;
  std::array<std::int64_t, kMaxDims> dims{};
  int count = -1;  // number of dimensions; -1: not a tensor

  void append(std::int64_t dim) {
    count = count < 0 ? 1 : count + 1;
    auto& entry = dims[static_cast<std::size_t>(count < kMaxDims ? count - 1 : kMaxDims - 1)];
    entry = static_cast<std::int64_t>(static_cast<std::uint64_t>(entry) * 1000003u +
                                      static_cast<std::uint64_t>(dim));
  }
};

/// One collective as a rank asked for it. The memory it names stays valid until the operation ends.
struct Operation {
  Kind kind = Kind::kBarrier;
  DType dtype = DType::kUint8;
  ReduceOp op = ReduceOp::kSum;
  Algorithm algorithm = Algorithm::kAuto;
  int root = 0;
  /// AVG divides by this, once, in the accumulator; 0 stands for the group's size.
  std::int64_t divisor = 0;
  /// Elements of `input`.
  std::size_t count = 0;
  const std::byte* input = nullptr;
  /// all_gather: size() * count elements. all_reduce and broadcast: count elements, may be `input`.
  std::byte* output = nullptr;
  Shape shape;
  /// What the user calls it, for errors and signatures: "bucket 3", a parameter. May be empty.
  std::string name;
  /// Seconds for the whole operation, from its start; 0 stands for the group's default.
  double timeout_s = 0;
};

}  // namespace pycomm
