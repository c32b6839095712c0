#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/device_call.h"
#include "core/device_memory.h"
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
  kReduce = 5,
  kGather = 6,
  kScatter = 7,
  kReduceScatter = 8,
  kAllToAll = 9,
  kAllocateOnDevice = 10,
};

constexpr bool reduces(Kind kind) {
  return kind == Kind::kAllReduce || kind == Kind::kReduce || kind == Kind::kReduceScatter;
}

/// Of an all-reduce between hosts; inside one host there is a single one. kExactOrder asks for any
/// that folds in the canonical order. The last two are what collectives on GPUs have, and none
/// else: reductions that were asked for in that order the second one.
enum class Algorithm : std::uint8_t {
  kAuto = 0,
  kDirect = 1,
  kRing = 2,
  kGatherFold = 3,
  kGpu = 4,
  kExactOrder = 5,
  kGpuExactOrder = 6
};

constexpr bool is_on_gpus(Algorithm algorithm) {
  return algorithm == Algorithm::kGpu || algorithm == Algorithm::kGpuExactOrder;
}

constexpr const char* name_of(Algorithm algorithm) {
  switch (algorithm) {
    case Algorithm::kAuto:
      return "auto";
    case Algorithm::kDirect:
      return "direct";
    case Algorithm::kRing:
      return "ring";
    case Algorithm::kGatherFold:
      return "gather_fold";
    case Algorithm::kGpu:
      return "gpu";
    case Algorithm::kExactOrder:
    case Algorithm::kGpuExactOrder:
      return "exact_order";
  }
  return "unknown algorithm";
}

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
///
/// With p ranks and n = `count`, in elements; what a rank does not read or write may be null:
///
///   kind             input                    output
///   kAllReduce       n                        n, may be the input
///   kReduce          n                        n on the root, may be the input
///   kBroadcast       n on the root            n, may be the input
///   kAllGather       n                        p * n, by rank; input may be its own place in it
///   kGather          n                        p * n on the root; as above
///   kScatter         p * n on the root        n; output may be its own place in the input
///   kReduceScatter   p * n                    n; as above
///   kAllToAll        p * n                    p * n, elsewhere
///
/// kAllocateOnDevice gives each rank `device_memory` of `count` bytes, which may differ.
///
/// With `input_counts` or `output_counts` block r has that many elements instead of n, blocks lie
/// end to end, and `count` is what this rank brings.
struct Operation {
  Kind kind = Kind::kBarrier;
  DType dtype = DType::kUint8;
  ReduceOp op = ReduceOp::kSum;
  Algorithm algorithm = Algorithm::kAuto;
  int root = 0;
  /// AVG divides by this, once, in the accumulator; 0 stands for the group's size.
  std::int64_t divisor = 0;
  /// Every input element is multiplied by this in the accumulator before it is folded, and the
  /// folded one by `postscale`, after the divisor and before the one rounding.
  double prescale = 1;
  double postscale = 1;
  std::size_t count = 0;
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  /// kAllToAll: elements for each rank; empty: `count` for each.
  std::vector<std::size_t> input_counts;
  /// kAllToAll: elements from each rank. kAllGather and kGather: what each rank brings, the same
  /// on every rank. Empty: `count` from each.
  std::vector<std::size_t> output_counts;
  Shape shape;
  /// What the user calls it, for errors and signatures: "bucket 3", a parameter. May be empty.
  std::string name;
  /// Where the user's code made the call, "train.py:31", for errors; null: not known. It lives to
  /// the end of the process.
  const char* site = nullptr;
  /// Seconds for the whole operation, from its start; 0 stands for the group's default.
  double timeout_s = 0;
  /// Seconds after which a rank that waits says so on stderr; 0: never. Set by the group.
  double warn_after_s = 0;
  /// The GPU, as CUDA numbers them here, in whose memory input and output lie; -1: the host's.
  int device = -1;
  /// What is on this stream when the operation is issued comes before it.
  StreamAddress stream = 0;
  /// Set by the group if there is a device.
  std::shared_ptr<DeviceCall> device_call;
  std::shared_ptr<DeviceMemory> device_memory;  // of kAllocateOnDevice
};

}  // namespace pycomm
