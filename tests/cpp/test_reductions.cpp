// Reductions on every placement, with every op and with scales.

#include <chrono>
#include <thread>

#include "collective_cases.h"

namespace {

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::ReduceOp;

const std::vector<Case> kOpsAndScales = [] {
  std::vector<Case> cases;
  const auto add = [&](DType dtype, ReduceOp op, double prescale = 1, double postscale = 1) {
    cases.push_back({dtype, 0, false, op, prescale, postscale});
  };
  add(DType::kFloat32, ReduceOp::kMin);
  add(DType::kInt64, ReduceOp::kMax);
  add(DType::kFloat32, ReduceOp::kProd);
  add(DType::kInt64, ReduceOp::kProd);
  add(DType::kUint8, ReduceOp::kBand);
  add(DType::kInt64, ReduceOp::kBor);
  add(DType::kUint8, ReduceOp::kBxor);
  add(DType::kFloat32, ReduceOp::kAvg);
  add(DType::kBFloat16, ReduceOp::kAvg);
  add(DType::kFloat32, ReduceOp::kSum, 0.5, 4);
  add(DType::kBFloat16, ReduceOp::kSum, 0.5, 4);
  add(DType::kBFloat16, ReduceOp::kAvg, 4, 0.5);
  add(DType::kFloat32, ReduceOp::kMax, 0.5, 4);
  return cases;
}();

/// What rank r brings at position i; for AVG so much that what is divided stays whole.
int input_of(const Case& with, int rank, int size, std::size_t i) {
  return brought(rank, i) * (with.op == ReduceOp::kAvg ? size : 1);
}

int combined(ReduceOp op, int a, int b) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return a + b;
    case ReduceOp::kMin:
      return std::min(a, b);
    case ReduceOp::kMax:
      return std::max(a, b);
    case ReduceOp::kProd:
      return a * b;
    case ReduceOp::kBand:
      return a & b;
    case ReduceOp::kBor:
      return a | b;
    case ReduceOp::kBxor:
      return a ^ b;
  }
  throw check::Failure("an op this test does not know");
}

int folded(const Case& with, int size, std::size_t i) {
  int value = input_of(with, 0, size, i);
  for (int rank = 1; rank < size; ++rank) {
    value = combined(with.op, value, input_of(with, rank, size, i));
  }
  if (with.op == ReduceOp::kAvg) value /= size;
  return static_cast<int>(value * with.prescale * with.postscale);
}

}  // namespace

TEST(reduce_gives_the_root_the_fold_and_leaves_the_inputs) {
  on_every_placement(
      [](Group& group, const Case& with) {
        for (const int root : {0, group.size() - 1}) {
          for (const bool in_place : {false, true}) {
            Buffer input(group, with.dtype, with.count, with.in_arena);
            Buffer output(group, with.dtype, with.count, with.in_arena);
            const auto mine = [&](std::size_t i) {
              return input_of(with, group.rank(), group.size(), i);
            };
            const auto result = [&](std::size_t i) { return folded(with, group.size(), i); };
            input.fill(mine);
            output.fill([](std::size_t) { return 77; });
            auto operation = operation_of(Kind::kReduce, with, input, in_place ? input : output);
            operation.root = root;
            const bool is_root = group.rank() == root;
            if (!is_root && !in_place) operation.output = nullptr;
            group.run(operation, kNoInterrupt);
            if (is_root) (in_place ? input : output).check(result);
            if (!is_root || !in_place) input.check(mine);
            if (!is_root || in_place) output.check([](std::size_t) { return 77; });
          }
        }
      },
      kOpsAndScales);
}

TEST(all_reduce_out_of_place_leaves_the_input) {
  on_every_placement(
      [](Group& group, const Case& with) {
        Buffer input(group, with.dtype, with.count, with.in_arena);
        Buffer output(group, with.dtype, with.count, with.in_arena);
        const auto mine = [&](std::size_t i) {
          return input_of(with, group.rank(), group.size(), i);
        };
        const auto result = [&](std::size_t i) { return folded(with, group.size(), i); };
        input.fill(mine);
        group.run(operation_of(Kind::kAllReduce, with, input, output), kNoInterrupt);
        input.check(mine);
        output.check(result);
        group.run(operation_of(Kind::kAllReduce, with, input, input), kNoInterrupt);
        input.check(result);
      },
      kOpsAndScales);
}

TEST(all_reduce_finds_one_way_where_some_buffers_lie_in_arenas_and_some_do_not) {
  on_every_placement(
      [](Group& group, const Case& with) {
        for (int round = 0; round < 3; ++round) {
          const bool even = (group.rank() + round) % 2 == 0;
          Buffer buffer(group, with.dtype, with.count, with.in_arena == even);
          buffer.fill([&](std::size_t i) { return input_of(with, group.rank(), group.size(), i); });
          group.run(operation_of(Kind::kAllReduce, with, buffer, buffer), kNoInterrupt);
          buffer.check([&](std::size_t i) { return folded(with, group.size(), i); });
        }
      },
      kOpsAndScales);
}

// A call that has begun in its caller's thread goes on from where it is when a peer is late: before
// anything is folded, or behind its own fold, which must not be done twice.
TEST(all_reduce_waits_for_late_ranks_at_every_step) {
  for (const bool in_arena : {false, true}) {
    run_ranks({0, 0, 0}, [in_arena](Group& group) {
      for (const std::size_t count : {std::size_t{5}, std::size_t{700}, std::size_t{40000}}) {
        const Case with{DType::kFloat32, count, in_arena};
        Buffer buffer(group, with.dtype, count, in_arena);
        for (int round = 0; round < 12; ++round) {
          buffer.fill([&](std::size_t i) { return brought(group.rank(), i); });
          if (round % 4 == group.rank()) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
          }
          group.run(operation_of(Kind::kAllReduce, with, buffer, buffer), kNoInterrupt);
          buffer.check([&](std::size_t i) { return folded(with, group.size(), i); });
        }
      }
    });
  }
}

TEST(reduce_scatter_gives_every_rank_its_block_of_the_fold) {
  on_every_placement(
      [](Group& group, const Case& with) {
        const std::size_t begin = with.count * static_cast<std::size_t>(group.rank());
        const auto all = with.count * static_cast<std::size_t>(group.size());
        Buffer input(group, with.dtype, all, with.in_arena);
        Buffer output(group, with.dtype, with.count, with.in_arena);
        const auto mine = [&](std::size_t i) {
          return input_of(with, group.rank(), group.size(), i);
        };
        const auto result = [&](std::size_t i) { return folded(with, group.size(), i); };
        input.fill(mine);
        auto operation = operation_of(Kind::kReduceScatter, with, input, output);
        group.run(operation, kNoInterrupt);
        input.check(mine);
        output.check([&](std::size_t i) { return result(begin + i); });
        operation.output = input.data() + begin * size_of(with.dtype);
        group.run(operation, kNoInterrupt);
        input.check([&](std::size_t i) {
          return i >= begin && i < begin + with.count ? result(i) : mine(i);
        });
      },
      kOpsAndScales);
}
