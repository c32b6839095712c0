#include "check.h"
#include "nccl/cards.h"

using pycomm::Placement;
using pycomm::nccl::Card;
using pycomm::nccl::kernels_problem_of;
using pycomm::nccl::least_scratch_of;
using pycomm::nccl::problem_of;

namespace {

Card card(int version, const std::string& bus_id) {
  Card made;
  made.nccl_version = version;
  made.set_bus_id(bus_id);
  return made;
}

const Placement kTwoHosts = Placement::of({"a", "a", "b"});

}  // namespace

TEST(gpus_of_different_hosts_may_have_one_bus_id) {
  CHECK_EQUAL(problem_of({card(23203, "0000:10:00.0"), card(23203, "0000:11:00.0"),
                          card(23203, "0000:10:00.0")},
                         kTwoHosts),
              "");
}

TEST(two_ranks_of_one_host_need_two_gpus) {
  const auto problem = problem_of(
      {card(23203, "0000:10:00.0"), card(23203, "0000:10:00.0"), card(23203, "0000:10:00.0")},
      kTwoHosts);
  CHECK(problem.starts_with("ranks 0 and 1 both use GPU 0000:10:00.0 of one host"));
}

TEST(all_have_the_same_nccl) {
  const auto problem = problem_of(
      {card(23203, "0000:10:00.0"), card(23203, "0000:11:00.0"), card(22907, "0000:10:00.0")},
      kTwoHosts);
  CHECK(problem.starts_with("rank 0 has NCCL 2.32.3 and rank 2 has 2.29.7"));
}

TEST(what_one_rank_lacks_is_told_first_and_cut_to_fit) {
  Card lacking = card(0, "0000:11:00.0");
  lacking.set_problem("NCCL: none was found" + std::string(1000, '.'));
  const auto problem =
      problem_of({card(23203, "0000:10:00.0"), lacking}, Placement::of({"a", "a"}));
  CHECK(problem.starts_with("rank 1 cannot use NCCL: NCCL: none was found..."));
  CHECK(problem.size() < 500);
}

TEST(what_exact_order_needs_is_told_of_the_first_rank_without_and_by_the_least) {
  Card first = card(23203, "0000:10:00.0");
  first.scratch_bytes = 4096;
  Card second = card(23203, "0000:11:00.0");
  second.scratch_bytes = 1024;
  CHECK_EQUAL(kernels_problem_of({first, second}), "");
  CHECK_EQUAL(least_scratch_of({first, second}), 1024u);
  second.set_kernels_problem("there is no such file");
  CHECK_EQUAL(kernels_problem_of({first, second}), "rank 1 has no kernels: there is no such file");
  CHECK_EQUAL(problem_of({first, second}, Placement::of({"a", "a"})), "");  // NCCL goes without
}
