#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "core/operation.h"

namespace pycomm {

/// What a rank is about to do, in the form in which ranks compare it: plain bytes, no pointers, no
/// padding. Equal signatures mean the same call at the same position after the same history.
struct Signature {
  static constexpr std::size_t kMaxName = 111;
  static constexpr std::size_t kMaxSite = 64;

  std::uint64_t sequence = 0;
  /// Extends over every earlier signature of the group.
  std::uint64_t history = 0;
  std::uint64_t count = 0;
  std::int64_t divisor = 0;
  double prescale = 1;
  double postscale = 1;
  /// Over what each rank brings, where that differs; 0: the same.
  std::uint64_t counts_hash = 0;
  std::array<std::int64_t, Shape::kMaxDims> dims{};
  /// Over the whole name, of which `name` shows the beginning.
  std::uint64_t name_hash = 0;
  std::int32_t root = 0;
  Kind kind = Kind::kBarrier;
  DType dtype = DType::kUint8;
  ReduceOp op = ReduceOp::kSum;
  Algorithm algorithm = Algorithm::kAuto;
  std::int8_t dim_count = -1;
  // For errors: cut off, end at the first zero.
  std::array<char, kMaxName> name{};
  std::array<char, kMaxSite> site{};

  static Signature of(const Operation& operation, std::uint64_t sequence, std::uint64_t history);

  /// Becomes the signature of `operation`. Every operation pays for this: only what is read is
  /// written, so `dims` beyond dim_count and texts beyond their ends keep what was there.
  void assign(const Operation& operation, std::uint64_t sequence_in, std::uint64_t history_in);

  /// 64 bits over all but the texts. Ranks compare this; the rest is read to explain a difference.
  std::uint64_t hash() const;

  /// "all_reduce of 4096 float32, shape (64, 64), SUM".
  std::string describe() const;

  /// "4096 float32, shape (64, 64)".
  std::string elements() const;

  /// " at train.py:31", or nothing.
  std::string place() const;
};

static_assert(sizeof(Signature) == 8 * 16 + 4 + 5 + Signature::kMaxName + Signature::kMaxSite,
              "no padding");

constexpr const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::kBarrier:
      return "barrier";
    case Kind::kAllReduce:
      return "all_reduce";
    case Kind::kBroadcast:
      return "broadcast";
    case Kind::kAllGather:
      return "all_gather";
    case Kind::kShutdown:
      return "shutdown";
    case Kind::kReduce:
      return "reduce";
    case Kind::kGather:
      return "gather";
    case Kind::kScatter:
      return "scatter";
    case Kind::kReduceScatter:
      return "reduce_scatter";
    case Kind::kAllToAll:
      return "all_to_all";
    case Kind::kAllocateOnDevice:
      return "allocate_on_device";
  }
  return "unknown operation";
}

/// "call #41 differs: rank 2 made all_reduce of ..., rank 3 made broadcast of ...", with the
/// remedy.
std::string describe_mismatch(int rank, const Signature& mine, int other_rank,
                              const Signature& other);

}  // namespace pycomm
