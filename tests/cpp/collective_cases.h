#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "group/group.h"
#include "ranks.h"

// What the tests of collectives share: placements, buffers whose content every rank can compute,
// and the round over all of them. Numbers are small and whole, exact in every dtype, so that the
// order of a fold does not matter here.

inline constexpr auto kNoInterrupt = [] {};

inline const std::vector<std::vector<int>> kPlacements = {
    {0},    {0, 0},       {0, 0, 0},    {0, 0, 0, 0},    {0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0, 0},
    {0, 1}, {0, 0, 1, 1}, {0, 0, 0, 1}, {0, 1, 0, 1, 1}, {0, 1, 2}};

inline void store(pycomm::DType dtype, std::byte* at, int value) {
  const auto put = [&](auto number) { std::memcpy(at, &number, sizeof(number)); };
  using pycomm::DType;
  switch (dtype) {
    case DType::kUint8:
      return put(static_cast<std::uint8_t>(value));
    case DType::kInt64:
      return put(static_cast<std::int64_t>(value));
    case DType::kFloat32:
      return put(static_cast<float>(value));
    case DType::kBFloat16: {  // the upper half of the float32: exact for up to 8 bits
      const auto number = static_cast<float>(value);
      std::uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      return put(static_cast<std::uint16_t>(bits >> 16));
    }
    default:
      throw check::Failure("a dtype this test does not store");
  }
}

/// Elements in private memory or in the rank's arena, on a cache line or one element off.
class Buffer {
 public:
  Buffer(pycomm::Group& group, pycomm::DType dtype, std::size_t count, bool in_arena)
      : dtype_(dtype), count_(count), offset_(in_arena ? 0 : size_of(dtype)) {
    const std::size_t bytes = count * size_of(dtype) + offset_;
    if (in_arena) {
      block_ = group.allocate(std::max<std::size_t>(1, bytes));
    } else {
      memory_.resize(bytes);
    }
  }

  std::byte* data() { return (block_ ? block_->data() : memory_.data()) + offset_; }
  std::size_t count() const { return count_; }

  template <typename ValueAt>
  void fill(const ValueAt& value_at) {
    for (std::size_t i = 0; i < count_; ++i) {
      store(dtype_, data() + i * size_of(dtype_), value_at(i));
    }
  }

  template <typename ValueAt>
  void check(const ValueAt& value_at) {
    for (std::size_t i = 0; i < count_; ++i) {
      std::byte expected[8] = {};
      store(dtype_, expected, value_at(i));
      if (std::memcmp(data() + i * size_of(dtype_), expected, size_of(dtype_)) != 0) {
        throw check::Failure("element " + std::to_string(i) + " of " + std::to_string(count_) +
                             " " + name_of(dtype_) + " is not " + std::to_string(value_at(i)));
      }
    }
  }

 private:
  pycomm::DType dtype_;
  std::size_t count_;
  std::size_t offset_;
  std::vector<std::byte> memory_;
  std::shared_ptr<pycomm::ArenaBlock> block_;
};

/// One call: what it moves or folds, and in which memory.
struct Case {
  pycomm::DType dtype;
  std::size_t count;
  bool in_arena;
  pycomm::ReduceOp op = pycomm::ReduceOp::kSum;
  double prescale = 1;
  double postscale = 1;
};

/// What rank r brings at position i: 1 to 3.
inline int brought(int rank, std::size_t i) {
  return 1 + static_cast<int>((i * 7 + static_cast<std::size_t>(rank) * 5 + i / 11) % 3);
}

inline pycomm::Operation operation_of(pycomm::Kind kind, const Case& with, Buffer& input,
                                      Buffer& output) {
  pycomm::Operation operation;
  operation.kind = kind;
  operation.dtype = with.dtype;
  operation.op = with.op;
  operation.prescale = with.prescale;
  operation.postscale = with.postscale;
  operation.count = with.count;
  operation.input = input.data();
  operation.output = output.data();
  return operation;
}

using Body = void (*)(pycomm::Group&, const Case&);

/// `body` on every placement, with private memory and in the arena: float32 in every size, other
/// dtypes and `more` in two, through staging so small that a thousand elements take many pieces;
/// a large one through the staging of every day.
inline void on_every_placement(Body body, std::vector<Case> more = {}) {
  using pycomm::DType;
  constexpr pycomm::Staging kTiny{pycomm::Staging::kLeastPieceBytes};
  for (const auto dtype : {DType::kBFloat16, DType::kInt64, DType::kUint8}) {
    more.push_back({dtype, 0, false});
  }
  for (const auto& hosts : kPlacements) {
    for (const bool in_arena : {false, true}) {
      const auto small = [&](pycomm::Group& group) {
        const std::size_t p = hosts.size();
        for (const std::size_t count :
             {std::size_t{0}, std::size_t{1}, p - 1, p, p + 1, std::size_t{1000}}) {
          body(group, {DType::kFloat32, count, in_arena});
        }
        for (Case with : more) {
          with.in_arena = in_arena;
          for (const std::size_t count : {p + 1, std::size_t{1000}}) {
            with.count = count;
            body(group, with);
          }
        }
      };
      run_ranks(hosts, small, kTiny);
      run_ranks(hosts,
                [&](pycomm::Group& group) { body(group, {DType::kFloat32, 150000, in_arena}); });
    }
  }
}
