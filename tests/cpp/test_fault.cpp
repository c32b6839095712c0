// find_fault: which standings are a fault, and which only look like one.

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "group/fault.h"

namespace {

using pycomm::find_fault;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::Signature;
using pycomm::Standing;

constexpr std::uint32_t kMain = 1;
constexpr std::uint32_t kOther = 2;

/// A rank as it is told of.
class Rank {
 public:
  explicit Rank(int rank) { standing_.rank = rank; }

  /// `thread` waits in number `sequence` of `group`.
  Rank& waits(std::uint64_t group, std::uint64_t sequence, std::uint32_t thread = kMain,
              std::size_t count = 4) {
    Operation operation;
    operation.kind = Kind::kAllReduce;
    operation.count = count;
    auto& call = standing_.calls.at(static_cast<std::size_t>(standing_.call_count++));
    call.group = group;
    call.tag = static_cast<std::int32_t>(group);
    call.group_rank = standing_.rank;
    call.thread = thread;
    call.members = {'0', ',', ' ', '1'};
    call.number = sequence;
    call.signature = Signature::of(operation, sequence, 0);
    call.hash = call.signature.hash();
    return *this;
  }
  /// So many operations of `group` were called, the last one by `thread`.
  Rank& issued(std::uint64_t group, std::uint64_t operations, std::uint32_t thread = kMain) {
    standing_.groups.at(static_cast<std::size_t>(standing_.group_count++)) = {group, operations,
                                                                              thread, 0};
    return *this;
  }
  operator Standing() const { return standing_; }

 private:
  Standing standing_;
};

std::string text_of(const std::vector<Standing>& standings) {
  const auto fault = find_fault(standings);
  return fault ? fault->text : "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

constexpr std::uint64_t A = 1;
constexpr std::uint64_t B = 2;
constexpr std::uint64_t C = 3;

}  // namespace

TEST(nobody_waits) {
  CHECK_EQUAL(text_of({}), std::string());
  CHECK_EQUAL(text_of({Rank(0).issued(A, 3), Rank(1)}), std::string());
}

TEST(ranks_in_one_call_do_not_wait_for_each_other_however_many_parts_it_has) {
  std::vector<Standing> standings = {Rank(1).waits(A, 7).issued(A, 2),
                                     Rank(2).waits(A, 7).issued(A, 2)};
  for (Standing& standing : standings) standing.calls[0].number = 2;
  CHECK_EQUAL(text_of(standings), std::string());
}

TEST(two_groups_in_opposite_order_are_a_circle) {
  const std::vector<Standing> standings = {Rank(1).waits(B, 1).issued(A, 0).issued(B, 1),
                                           Rank(0).waits(A, 1).issued(A, 1).issued(B, 0)};
  const auto fault = find_fault(standings);
  CHECK(fault.has_value());
  CHECK(contains(fault->text,
                 "rank 0 in all_reduce of 4 uint8, SUM (call #1 of the group of ranks 0, 1) for "
                 "rank 1,"));
  CHECK(contains(fault->text, "for rank 0."));
  CHECK(contains(fault->text, "same order"));
  CHECK_EQUAL(fault->concerned.size(), std::size_t{2});
  CHECK_EQUAL(fault->concerned[0].rank, 0);
  CHECK_EQUAL(fault->concerned[0].tag, 1);
  CHECK_EQUAL(fault->concerned[1].rank, 1);
  CHECK_EQUAL(fault->concerned[1].tag, 2);
  // Whatever order they come in.
  CHECK_EQUAL(text_of({standings[1], standings[0]}), fault->text);
}

TEST(a_circle_of_three) {
  const auto text = text_of({Rank(0).waits(A, 1).issued(A, 1).issued(C, 0),
                             Rank(1).waits(B, 7).issued(A, 0).issued(B, 7),
                             Rank(2).waits(C, 1).issued(B, 6).issued(C, 1)});
  CHECK(contains(text, "for rank 1,"));
  CHECK(contains(text, "for rank 2,"));
  CHECK(contains(text, "for rank 0."));
}

TEST(a_chain_that_ends_with_a_rank_that_computes_is_none) {
  CHECK_EQUAL(text_of({Rank(0).waits(A, 1).issued(A, 1),
                       Rank(1).waits(B, 1).issued(A, 0).issued(B, 1), Rank(2).issued(B, 0)}),
              std::string());
}

TEST(what_was_issued_without_a_wait_is_no_link) {
  // Rank 1 has started its part of A, and waits for B first.
  CHECK_EQUAL(text_of({Rank(0).waits(A, 1).issued(A, 1).issued(B, 0),
                       Rank(1).waits(B, 1).issued(A, 1).issued(B, 1)}),
              std::string());
}

TEST(a_group_that_another_thread_calls_is_no_link) {
  CHECK_EQUAL(text_of({Rank(0).waits(A, 5).issued(A, 5).issued(B, 2),
                       Rank(1).waits(B, 3).issued(A, 4, kOther).issued(B, 3)}),
              std::string());
  // Until that thread waits, too.
  CHECK(contains(text_of({Rank(0).waits(A, 5).issued(A, 5).issued(B, 2),
                          Rank(1).waits(B, 3, kOther).issued(A, 4, kOther).issued(B, 3)}),
                 "in a circle"));
}

TEST(ranks_at_the_same_call_are_no_fault_even_if_they_are_stuck) {
  CHECK_EQUAL(text_of({Rank(0).waits(A, 5).issued(A, 5), Rank(1).waits(A, 5).issued(A, 6)}),
              std::string());
}

TEST(a_rank_ahead_in_one_group_waits_for_none_behind_it) {
  // Rank 0 has ended (A, 5), whose last message to rank 1 is on its way.
  CHECK_EQUAL(text_of({Rank(0).waits(A, 6).issued(A, 6), Rank(1).waits(A, 5).issued(A, 5)}),
              std::string());
}

TEST(different_calls_at_one_position_are_a_mismatch_though_others_are_missing) {
  const auto fault = find_fault(std::vector<Standing>{Rank(0).waits(A, 5, kMain, 10).issued(A, 5),
                                                      Rank(2).waits(A, 5, kMain, 11).issued(A, 5)});
  CHECK(fault.has_value());
  CHECK(contains(fault->text, "call #5 differs: rank 0 made all_reduce of 10 uint8, SUM, rank 2"));
  CHECK_EQUAL(fault->concerned.size(), std::size_t{2});
}

TEST(different_calls_of_two_groups_with_one_tag_are_no_fault) {
  Standing other = Rank(2).waits(B, 5, kMain, 11).issued(B, 5);
  other.calls[0].tag = 1;
  CHECK_EQUAL(text_of({Rank(0).waits(A, 5, kMain, 10).issued(A, 5), other}), std::string());
}

TEST(a_board_shows_the_last_standing_whole) {
  pycomm::StandingBoard board;
  CHECK(!board.read().has_value());
  board.show(Rank(3).waits(A, 5).issued(A, 5));
  const auto first = board.version();
  CHECK_EQUAL(board.read()->calls[0].signature.sequence, std::uint64_t{5});
  board.show(Rank(3));
  CHECK(board.version() != first);
  CHECK_EQUAL(board.read()->rank, 3);
  CHECK_EQUAL(board.read()->call_count, 0);
}
