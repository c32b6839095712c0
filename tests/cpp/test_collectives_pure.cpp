// The pure decisions under the collectives: partition, placement, signatures.

#include <set>

#include "check.h"
#include "collectives/partition.h"
#include "collectives/placement.h"
#include "core/signature.h"

using pycomm::partition;
using pycomm::Placement;

TEST(chunks_tile_the_buffer_and_differ_by_less_than_two_granules) {
  for (const std::size_t count : {0, 1, 2, 3, 7, 64, 1000, 1001}) {
    for (const int parts : {1, 2, 3, 4, 5, 7, 8}) {
      for (const std::size_t granule : {1, 3, 16}) {
        std::size_t end = 0;
        std::size_t most = 0;
        std::size_t least = count + granule;
        for (int index = 0; index < parts; ++index) {
          const auto range = partition(count, parts, index, granule);
          CHECK_EQUAL(range.begin, end);
          CHECK(range.end >= range.begin);
          CHECK(range.end == count || range.end % granule == 0);
          end = range.end;
          most = std::max(most, range.count());
          least = std::min(least, range.count());
        }
        CHECK_EQUAL(end, count);
        CHECK(most - least < 2 * granule);
      }
    }
  }
}

TEST(hosts_are_ordered_by_their_lowest_rank) {
  const auto placement = Placement::of({"b", "a", "b", "a", "c"});
  CHECK(placement.hosts == (std::vector<std::vector<int>>{{0, 2}, {1, 3}, {4}}));
  CHECK(placement.host_of == (std::vector<int>{0, 1, 0, 1, 2}));
  CHECK(placement.local_rank_of == (std::vector<int>{0, 0, 1, 1, 0}));
  CHECK_EQUAL(placement.lanes(), 1);
}

TEST(every_field_of_a_signature_changes_its_hash) {
  pycomm::Operation base;
  base.kind = pycomm::Kind::kAllReduce;
  base.count = 6;
  base.shape = {{2, 3}, 2};
  base.name = "bucket 1";
  std::set<std::uint64_t> hashes;
  const auto add = [&](const auto& change, std::uint64_t sequence = 1, std::uint64_t history = 0) {
    pycomm::Operation changed = base;
    change(changed);
    hashes.insert(pycomm::Signature::of(changed, sequence, history).hash());
  };
  add([](auto&) {});
  add([](auto&) {}, 2);
  add([](auto&) {}, 1, 1);
  add([](auto& o) { o.kind = pycomm::Kind::kBroadcast; });
  add([](auto& o) { o.dtype = pycomm::DType::kInt8; });
  add([](auto& o) { o.op = pycomm::ReduceOp::kMax; });
  add([](auto& o) { o.algorithm = pycomm::Algorithm::kRing; });
  add([](auto& o) { o.root = 1; });
  add([](auto& o) { o.divisor = 2; });
  add([](auto& o) { o.count = 7; });
  add([](auto& o) { o.shape = {{3, 2}, 2}; });
  add([](auto& o) { o.shape = {{6}, 1}; });
  add([](auto& o) { o.name = "bucket 2"; });
  // Beyond what is shown of a name or a shape, too.
  const std::string longer(pycomm::Signature::kMaxName + 20, 'x');
  add([&](auto& o) { o.name = longer + "1"; });
  add([&](auto& o) { o.name = longer + "2"; });
  for (const std::int64_t last : {1, 2}) {
    add([&](auto& o) {
      for (int i = 0; i < pycomm::Shape::kMaxDims; ++i) o.shape.append(1);
      o.shape.append(last);
    });
  }
  CHECK_EQUAL(hashes.size(), std::size_t{17});
}

TEST(why_a_rank_leaves_is_told_and_no_difference) {
  pycomm::Operation failing;
  failing.kind = pycomm::Kind::kShutdown;
  failing.name = "ValueError: bad batch";
  pycomm::Operation leaving;
  leaving.kind = pycomm::Kind::kShutdown;
  const auto first = pycomm::Signature::of(failing, 3, 0);
  CHECK_EQUAL(first.hash(), pycomm::Signature::of(leaving, 3, 0).hash());

  pycomm::Operation calling;
  calling.kind = pycomm::Kind::kBarrier;
  CHECK_EQUAL(pycomm::describe_mismatch(0, pycomm::Signature::of(calling, 3, 0), 1, first),
              std::string("call #3 differs: rank 0 made barrier, rank 1 made shutdown after "
                          "ValueError: bad batch.\n  The one that leaves has failed: read its log "
                          "first."));
}

TEST(a_mismatch_tells_both_sides) {
  pycomm::Operation mine;
  mine.kind = pycomm::Kind::kAllReduce;
  mine.dtype = pycomm::DType::kFloat32;
  mine.count = 4096;
  pycomm::Operation theirs = mine;
  theirs.kind = pycomm::Kind::kBroadcast;
  theirs.root = 1;
  const auto text = pycomm::describe_mismatch(2, pycomm::Signature::of(mine, 41, 0), 3,
                                              pycomm::Signature::of(theirs, 41, 0));
  CHECK_EQUAL(text.substr(0, text.find('\n')),
              std::string("call #41 differs: rank 2 made all_reduce of 4096 float32, SUM, rank 3 "
                          "made broadcast of 4096 float32, root 1."));
}
