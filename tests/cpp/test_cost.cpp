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

/// What each rank's channel counted during one all-reduce.
std::vector<Traffic> count_traffic(const AllReduceJob& job, Algorithm algorithm) {
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
      std::vector<float> values(job.count * size_of(job.dtype) / sizeof(float) + 1, 0);
      Operation operation;
      operation.kind = Kind::kAllReduce;
      operation.algorithm = algorithm;
      operation.dtype = job.dtype;
      operation.count = job.count;
      operation.output = reinterpret_cast<std::byte*>(values.data());
      operation.input = operation.output;
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
