// Moves on every placement: gather, scatter and all_to_all, with blocks of equal and given lengths.

#include "collective_cases.h"
#include "core/error.h"

namespace {

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;

/// How many elements rank r brings where each brings another number; none of some.
std::size_t uneven(int rank, std::size_t count) {
  return rank % 3 == 1 ? 0 : count + static_cast<std::size_t>(rank);
}

std::size_t sent(int from, int to, std::size_t count) {
  return (from + 2 * to) % 4 == 0 ? 0 : count + static_cast<std::size_t>(3 * from + to);
}

}  // namespace

TEST(gather_and_all_gather_lay_the_ranks_end_to_end) {
  on_every_placement([](Group& group, const Case& with) {
    for (const bool given : {false, true}) {
      std::vector<std::size_t> counts;
      for (int rank = 0; rank < group.size(); ++rank) {
        counts.push_back(given ? uneven(rank, with.count) : with.count);
      }
      std::vector<int> expected;
      for (int rank = 0; rank < group.size(); ++rank) {
        for (std::size_t i = 0; i < counts[static_cast<std::size_t>(rank)]; ++i) {
          expected.push_back(brought(rank, i));
        }
      }
      const auto result = [&](std::size_t i) { return expected[i]; };
      const auto mine = [&](std::size_t i) { return brought(group.rank(), i); };
      Case my_case = with;
      my_case.count = counts[static_cast<std::size_t>(group.rank())];
      Buffer input(group, with.dtype, my_case.count, with.in_arena);
      input.fill(mine);
      for (const auto kind : {Kind::kGather, Kind::kAllGather}) {
        for (const int root : {0, group.size() - 1}) {
          Buffer output(group, with.dtype, expected.size(), with.in_arena);
          output.fill([](std::size_t) { return 77; });
          auto operation = operation_of(kind, my_case, input, output);
          operation.root = root;
          if (given) operation.output_counts = counts;
          const bool receives = kind == Kind::kAllGather || group.rank() == root;
          if (!receives) operation.output = nullptr;
          group.run(operation, kNoInterrupt);
          input.check(mine);
          if (receives) {
            output.check(result);
            // Again, each from its own place in the output.
            std::size_t begin = 0;
            for (int rank = 0; rank < group.rank(); ++rank) {
              begin += counts[static_cast<std::size_t>(rank)];
            }
            output.fill([&](std::size_t i) {
              return i >= begin && i < begin + my_case.count ? expected[i] : 77;
            });
            operation.input = output.data() + begin * size_of(with.dtype);
          }
          group.run(operation, kNoInterrupt);
          if (receives) output.check(result);
        }
      }
    }
  });
}

TEST(scatter_gives_every_rank_its_block_of_the_roots_input) {
  on_every_placement([](Group& group, const Case& with) {
    const std::size_t begin = with.count * static_cast<std::size_t>(group.rank());
    const auto all = with.count * static_cast<std::size_t>(group.size());
    for (const int root : {0, group.size() - 1}) {
      Buffer input(group, with.dtype, all, with.in_arena);
      Buffer output(group, with.dtype, with.count, with.in_arena);
      const auto roots = [&](std::size_t i) { return brought(root, i); };
      input.fill(roots);
      auto operation = operation_of(Kind::kScatter, with, input, output);
      operation.root = root;
      const bool is_root = group.rank() == root;
      if (!is_root) operation.input = nullptr;
      group.run(operation, kNoInterrupt);
      output.check([&](std::size_t i) { return roots(begin + i); });
      if (is_root) operation.output = input.data() + begin * size_of(with.dtype);
      group.run(operation, kNoInterrupt);
      input.check(roots);
    }
  });
}

TEST(all_to_all_swaps_equal_and_given_blocks) {
  on_every_placement([](Group& group, const Case& with) {
    for (const bool given : {false, true}) {
      const auto block = [&](int from, int to) {
        return given ? sent(from, to, with.count) : with.count;
      };
      // Rank s brings 1 to 3 at position i of its input, whoever that is for.
      std::vector<int> expected;
      std::size_t brings = 0;
      Operation counts;
      for (int rank = 0; rank < group.size(); ++rank) {
        std::size_t begin = 0;
        for (int to = 0; to < group.rank(); ++to) begin += block(rank, to);
        for (std::size_t i = 0; i < block(rank, group.rank()); ++i) {
          expected.push_back(brought(rank, begin + i));
        }
        brings += block(group.rank(), rank);
        counts.input_counts.push_back(block(group.rank(), rank));
        counts.output_counts.push_back(block(rank, group.rank()));
      }
      const auto mine = [&](std::size_t i) { return brought(group.rank(), i); };
      Buffer input(group, with.dtype, brings, with.in_arena);
      Buffer output(group, with.dtype, expected.size(), with.in_arena);
      input.fill(mine);
      auto operation = operation_of(Kind::kAllToAll, with, input, output);
      if (given) {
        operation.input_counts = counts.input_counts;
        operation.output_counts = counts.output_counts;
        operation.count = brings;
      }
      group.run(operation, kNoInterrupt);
      input.check(mine);
      output.check([&](std::size_t i) { return expected[i]; });
    }
  });
}

TEST(different_counts_of_an_all_to_all_end_every_rank_before_it_writes) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() < 2) continue;
    std::vector<int> untouched(hosts.size());
    const auto errors = run_ranks_catching(hosts, [&](Group& group) {
      const auto p = static_cast<std::size_t>(group.size());
      const bool wrong = group.rank() == group.size() - 1;
      const Case with{DType::kInt64, 5 * p, false};
      Buffer input(group, with.dtype, 5 * p, false);
      Buffer output(group, with.dtype, 5 * p, false);
      output.fill([](std::size_t) { return 77; });
      auto operation = operation_of(Kind::kAllToAll, with, input, output);
      operation.input_counts.assign(p, 5);
      operation.output_counts.assign(p, 5);
      if (wrong) operation.output_counts[0] = 4;  // rank 0 sends 5
      try {
        group.run(operation, kNoInterrupt);
      } catch (const pycomm::MismatchError&) {
        output.check([](std::size_t) { return 77; });
        untouched[static_cast<std::size_t>(group.rank())] = 1;
        throw;
      }
    });
    const std::string expected =
        "rank 0 sends 5 elements to rank " + std::to_string(hosts.size() - 1) + ", which expects 4";
    for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
      CHECK_EQUAL(untouched[rank], 1);
      CHECK(errors[rank].find(expected) != std::string::npos);
    }
  }
}

TEST(counts_that_cannot_be_are_refused_and_the_group_stays_usable) {
  run_ranks({0, 0}, [](Group& group) {
    const Case with{DType::kInt64, 3, false};
    Buffer input(group, with.dtype, 6, false);
    Buffer output(group, with.dtype, 6, false);
    auto gather = operation_of(Kind::kAllGather, with, input, output);
    gather.output_counts = {3};
    CHECK_THROWS(group.run(gather, kNoInterrupt), pycomm::InvalidArgumentError,
                 "output_counts has 1 entries, the group 2 ranks");
    gather.output_counts = {2, 2};
    CHECK_THROWS(group.run(gather, kNoInterrupt), pycomm::InvalidArgumentError,
                 "this rank brings 3 elements");
    auto exchange = operation_of(Kind::kAllToAll, with, input, output);
    exchange.input_counts = {1, 2, 3};
    CHECK_THROWS(group.run(exchange, kNoInterrupt), pycomm::InvalidArgumentError,
                 "input_counts has 3 entries");
    auto scatter = operation_of(Kind::kScatter, with, input, output);
    scatter.output_counts = {3, 3};
    CHECK_THROWS(group.run(scatter, kNoInterrupt), pycomm::InvalidArgumentError,
                 "all its blocks have one length");
    group.run(operation_of(Kind::kAllGather, with, input, output), kNoInterrupt);
  });
}
