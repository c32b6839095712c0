#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "collectives/cost.h"
#include "group/group.h"
#include "group/process.h"
#include "transport/channel_loopback.h"

using namespace pycomm;

namespace {

// Staging of 16 KiB a rank: a few thousand elements go in many pieces.
constexpr std::size_t kSmallPieces = 1024;

AllReduceJob job_of(std::size_t count, int hosts, int ranks_per_host, std::size_t piece_bytes,
                    DType dtype = DType::kFloat32) {
  return {count, dtype, hosts, ranks_per_host, ranks_per_host, piece_bytes};
}

/// What each rank's channel counted during one operation of `count` elements, given as all-reduce.
/// Blocks of another collective have `count` elements too.
std::vector<Traffic> count_traffic(const AllReduceJob& job, Algorithm algorithm,
                                   Kind kind = Kind::kAllReduce) {
  std::vector<int> hosts;
  for (int host = 0; host < job.hosts; ++host) {
    hosts.insert(hosts.end(), static_cast<std::size_t>(job.ranks_per_host), host);
  }
  std::vector<int> ranks(hosts.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  const auto processes =
      Process::loopback(hosts, {60, std::size_t{16} << 20, Staging{job.piece_bytes}, {}});
  std::vector<std::shared_ptr<Group>> groups;
  for (const auto& process : processes) {
    groups.push_back(Group::create(process, ranks, [&](const GroupRecord& mine) {
      return std::vector<GroupRecord>(ranks.size(), mine);
    }));
  }
  std::vector<std::string> errors(hosts.size());
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    threads.emplace_back([&, rank] {
      const std::size_t bytes = job.count * size_of(job.dtype);
      std::vector<float> values(bytes / sizeof(float) + 1, 0);
      // One block for each rank.
      std::vector<float> inputs(hosts.size() * bytes / sizeof(float) + 1, 0);
      std::vector<float> outputs(inputs.size(), 0);
      Operation operation;
      operation.kind = kind;
      operation.algorithm = algorithm;
      operation.dtype = job.dtype;
      operation.count = job.count;
      operation.output = reinterpret_cast<std::byte*>(values.data());
      operation.input = operation.output;
      if (kind != Kind::kAllReduce) {
        operation.input = reinterpret_cast<const std::byte*>(inputs.data());
        operation.output = reinterpret_cast<std::byte*>(outputs.data());
      }
      try {
        groups[rank]->run(std::move(operation), [] {});
      } catch (const std::exception& error) {
        errors[rank] = error.what();
        groups[rank]->abort(errors[rank]);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& process : processes) process->stop();
  std::vector<Traffic> counted;
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    CHECK_EQUAL(errors[rank], std::string());
    const auto& channel = dynamic_cast<const LoopbackChannel&>(*processes[rank]->channel);
    counted.push_back({channel.messages_sent(), channel.bytes_sent()});
  }
  return counted;
}

void check_traffic(const AllReduceJob& job, Algorithm algorithm) {
  const auto counted = count_traffic(job, algorithm);
  for (std::size_t rank = 0; rank < counted.size(); ++rank) {
    const int at = static_cast<int>(rank);
    const Traffic predicted =
        traffic_of(algorithm, job, at / job.ranks_per_host, at % job.ranks_per_host);
    if (predicted == counted[rank]) continue;
    throw check::Failure(std::string(name_of(algorithm)) + " of " + std::to_string(job.count) +
                         " " + name_of(job.dtype) + ", " + std::to_string(job.hosts) + " hosts x " +
                         std::to_string(job.ranks_per_host) + ", rank " + std::to_string(rank) +
                         ": sent " + std::to_string(counted[rank].messages) + " messages with " +
                         std::to_string(counted[rank].bytes) + " bytes, cost.h says " +
                         std::to_string(predicted.messages) + " with " +
                         std::to_string(predicted.bytes));
  }
}

void check_all_sizes(Algorithm algorithm) {
  for (const int hosts : {2, 3, 4, 5, 8}) {
    for (const int ranks : {1, 2, 3}) {
      for (const std::size_t count : {0, 1, 7, 1000, 5003}) {
        check_traffic(job_of(count, hosts, ranks, kSmallPieces), algorithm);
      }
    }
  }
}

/// docs/cost-model.md says what a collective of one piece sends: here each rank's messages and
/// bytes, without the messages that open the operation.
void check_one_piece(Kind kind, DType dtype, int hosts, int ranks_per_host,
                     const std::function<Traffic(int rank, std::uint64_t bytes)>& expected) {
  const AllReduceJob job = job_of(1000, hosts, ranks_per_host, Staging().piece_bytes, dtype);
  const Traffic opening = traffic_of(Algorithm::kDirect, job_of(0, hosts, 1, 1024), 0, 0);
  const auto counted = count_traffic(job, Algorithm::kAuto, kind);
  for (int rank = 0; rank < static_cast<int>(counted.size()); ++rank) {
    Traffic wanted = expected(rank, job.bytes());
    if (rank % ranks_per_host == 0) wanted += opening;
    const Traffic& sent = counted[static_cast<std::size_t>(rank)];
    CHECK_EQUAL(sent.messages, wanted.messages);
    CHECK_EQUAL(sent.bytes, wanted.bytes);
  }
}

void check_on_hosts(
    Kind kind, const std::function<Traffic(int rank, int hosts, int q, std::uint64_t n)>& model,
    DType dtype = DType::kFloat32) {
  for (const int hosts : {2, 3, 4, 5}) {
    for (const int q : {1, 2, 3}) {
      check_one_piece(kind, dtype, hosts, q,
                      [&](int rank, std::uint64_t n) { return model(rank, hosts, q, n); });
    }
  }
}

std::uint64_t whole(int number) { return static_cast<std::uint64_t>(number); }

}  // namespace

TEST(direct_sends_what_cost_says) { check_all_sizes(Algorithm::kDirect); }
TEST(ring_sends_what_cost_says) { check_all_sizes(Algorithm::kRing); }
TEST(gather_fold_sends_what_cost_says) { check_all_sizes(Algorithm::kGatherFold); }

TEST(chunks_of_many_segments_and_16_bit_floats_send_what_cost_says) {
  for (const Algorithm algorithm : {Algorithm::kDirect, Algorithm::kRing, Algorithm::kGatherFold}) {
    for (const int ranks : {1, 2}) {
      for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
        check_traffic(job_of(600001, 3, ranks, Staging().piece_bytes, dtype), algorithm);
      }
    }
  }
}

TEST(a_small_all_reduce_is_its_opening) {
  for (const int hosts : {2, 3, 4, 5, 8}) {
    const AllReduceJob job = job_of(4, hosts, 2, Staging().piece_bytes);
    CHECK_EQUAL(choose_algorithm({}, job), Algorithm::kGatherFold);
    std::uint64_t rounds = 0;
    while ((1 << rounds) < hosts) ++rounds;
    CHECK_EQUAL(traffic_of(Algorithm::kGatherFold, job, 0, 0).messages, rounds);
    CHECK_EQUAL(traffic_of(Algorithm::kGatherFold, job, 0, 1).messages, 0u);
  }
}

TEST(large_ones_are_exchanged_directly_and_never_go_around_the_ring) {
  for (const int hosts : {2, 4, 64, 1000}) {
    for (std::size_t count = 1; count < std::size_t{1} << 32; count *= 8) {
      CHECK(choose_algorithm({}, job_of(count, hosts, 8, Staging().piece_bytes)) !=
            Algorithm::kRing);
    }
    CHECK_EQUAL(choose_algorithm({}, job_of(std::size_t{1} << 28, hosts, 8, 512 << 10)),
                Algorithm::kDirect);
  }
}

TEST(direct_exchange_approaches_the_least_a_wire_can_carry) {
  const AllReduceJob job = job_of(6553600, 4, 1, Staging().piece_bytes);
  const CostModel cost{.alpha_s = 0, .gamma_s_per_byte = 0};
  const double bound = 2 * 3.0 / 4 * static_cast<double>(job.bytes()) * cost.beta_s_per_byte;
  CHECK(predict_seconds(cost, Algorithm::kDirect, job) < 1.0001 * bound);
  CHECK(predict_seconds(cost, Algorithm::kDirect, job) > 0.9999 * bound);
}

TEST(all_gather_and_reduce_scatter_send_a_block_to_each_other_host) {
  for (const Kind kind : {Kind::kAllGather, Kind::kReduceScatter}) {
    check_on_hosts(kind, [](int, int hosts, int, std::uint64_t n) {
      return whole(hosts - 1) * Traffic{1, n};
    });
  }
}

TEST(reduce_scatter_sends_sums_of_16_bit_floats_as_float32) {
  check_on_hosts(
      Kind::kReduceScatter,
      [](int, int hosts, int q, std::uint64_t n) {
        return whole(hosts - 1) * Traffic{1, q > 1 ? 2 * n : n};
      },
      DType::kBFloat16);
}

TEST(broadcast_goes_down_a_binomial_tree_of_hosts) {
  check_on_hosts(Kind::kBroadcast, [](int rank, int hosts, int q, std::uint64_t n) {
    const int host = rank / q;
    std::uint64_t children = 0;
    for (int bit = 1; host + bit < hosts && (host & bit) == 0; bit *= 2) ++children;
    return rank % q == 0 ? children * Traffic{1, n} : Traffic{};
  });
}

TEST(all_to_all_sends_a_block_to_each_rank_of_other_hosts) {
  check_on_hosts(Kind::kAllToAll, [](int, int hosts, int q, std::uint64_t n) {
    return whole((hosts - 1) * q) * Traffic{1, n};
  });
}

TEST(gather_takes_one_message_from_each_rank_of_other_hosts) {
  check_on_hosts(Kind::kGather, [](int rank, int, int q, std::uint64_t n) {
    return rank < q ? Traffic{} : Traffic{1, n};
  });
}

TEST(scatter_sends_all_from_the_root) {
  check_on_hosts(Kind::kScatter, [](int rank, int hosts, int q, std::uint64_t n) {
    return rank == 0 ? whole((hosts - 1) * q) * Traffic{1, n} : Traffic{};
  });
}

TEST(reduce_sends_2_n_less_a_host_s_part_to_the_root_s_host) {
  for (const int hosts : {2, 4, 5}) {
    const AllReduceJob job = job_of(1000, hosts, 2, Staging().piece_bytes);
    const Traffic opening = traffic_of(Algorithm::kDirect, job_of(0, hosts, 1, 1024), 0, 0);
    const auto counted = count_traffic(job, Algorithm::kAuto, Kind::kReduce);
    for (int host = 0; host < hosts; ++host) {
      const auto first = static_cast<std::size_t>(2 * host);
      const std::uint64_t bytes = counted[first].bytes + counted[first + 1].bytes - opening.bytes;
      // The root's host sends no finished part; any other sends all of its n.
      const std::uint64_t n = job.bytes();
      CHECK_EQUAL(bytes, host == 0 ? n - n / whole(hosts) : n);
    }
  }
}
