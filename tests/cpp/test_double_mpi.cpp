// GPU calls over an MPI that takes pointers to GPU memory, against the stand-in for libcudart
// (tests/double/) and one for that MPI (gpu_aware_channel.h). No GPU, and no such MPI. That such
// calls do what others do is in test_double_staged.cpp.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <stdexcept>
#include <utility>

#include "core/error.h"
#include "like_host.h"

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::nccl::Transport;

namespace {

constexpr auto kAware = [] { return std::string(); };
constexpr auto kNotAware = [] { return std::string("it was built without CUDA"); };

/// The stand-in for NCCL is too old on the first `count` ranks, as long as this lives.
class OldNccl {
 public:
  explicit OldNccl(std::size_t count) : count_(static_cast<int>(count)) {
    use_the_double();
    set(21703);
  }
  ~OldNccl() { set(0); }
  OldNccl(const OldNccl&) = delete;
  OldNccl& operator=(const OldNccl&) = delete;

 private:
  void set(int version) const {
    for (int rank = 0; rank < count_; ++rank) gpu_double::set_nccl_version(rank, version);
  }
  const int count_;
};

/// Whether this group's sums of floats go through the host.
bool is_staged(Group& group, Gpu& gpu) {
  float* const data = gpu.put(values(group.rank(), 100));
  group.run(gpu.sum(data, 100), no_check);
  CHECK(gpu.get(data, 100) == sums(group.size(), 100));
  group.run({}, no_check);  // all have come so far, and none has left
  const bool staged = gpu_double::census().pinned > 0;
  group.run({}, no_check);
  return staged;
}

using Ways = std::map<std::pair<int, int>, std::size_t>;  // by sender and receiver

/// What came to a host from others.
std::size_t received_by_host(int host, const std::vector<int>& hosts, const Ways& sent) {
  std::size_t received = 0;
  for (const auto& [way, bytes] : sent) {
    const int from = hosts[static_cast<std::size_t>(way.first)];
    const int to = hosts[static_cast<std::size_t>(way.second)];
    if (to == host && from != host) received += bytes;
  }
  return received;
}

/// What a rank has sent to others of its host.
std::size_t sent_inside_host(int rank, const std::vector<int>& hosts, const Ways& sent) {
  const int host = hosts[static_cast<std::size_t>(rank)];
  std::size_t bytes_sent = 0;
  for (const auto& [way, bytes] : sent) {
    if (way.first == rank && hosts[static_cast<std::size_t>(way.second)] == host) {
      bytes_sent += bytes;
    }
  }
  return bytes_sent;
}

}  // namespace

TEST(double_mpi_calls_leave_the_memory_of_the_host_alone) {
  run_over_mpi({0, 0, 1}, [](Group& group, Gpu& gpu) {
    for (const Kind kind : {Kind::kAllReduce, Kind::kBroadcast, Kind::kAllGather, Kind::kReduce,
                            Kind::kGather, Kind::kScatter, Kind::kReduceScatter, Kind::kAllToAll}) {
      check_like_host(group, gpu, call_of(group, kind, DType::kBFloat16, 700));
      check_like_host(group, gpu, call_of(group, kind, DType::kComplex64, 700));
    }
    CHECK(!is_staged(group, gpu));
    // Our kernels fold no integers.
    check_like_host(group, gpu, call_of(group, Kind::kAllReduce, DType::kInt32, 700));
    CHECK(is_staged(group, gpu));
  });
}

TEST(double_mpi_brings_what_everyone_receives_to_each_host_once) {
  const std::size_t n = 4800;
  for (const auto& hosts : {std::vector{0, 0, 1, 1}, {0, 1, 0, 1, 2, 2}, {0, 0, 0, 1}, {1, 0, 0}}) {
    const int root = static_cast<int>(hosts.size()) - 1;  // of call_of()
    const auto sharing = static_cast<std::size_t>(std::ranges::count(hosts, hosts.back()));
    for (const Kind kind : {Kind::kBroadcast, Kind::kAllGather}) {
      gpu_double::sent();
      run_over_mpi(hosts, [&](Group& group, Gpu& gpu) {
        check_like_host(group, gpu, call_of(group, kind, DType::kUint8, n));
      });
      const Ways sent = gpu_double::sent();
      for (const int host : hosts) {
        const auto here = static_cast<std::size_t>(std::ranges::count(hosts, host));
        const std::size_t from_root = host == hosts.back() ? 0 : n;
        CHECK_EQUAL(received_by_host(host, hosts, sent),
                    kind == Kind::kAllGather ? (hosts.size() - here) * n : from_root);
      }
      if (kind == Kind::kBroadcast) {
        CHECK_EQUAL(sent_inside_host(root, hosts, sent), 2 * n * (sharing - 1) / sharing);
      }
    }
  }
}

TEST(double_mpi_calls_and_staged_ones_read_what_each_other_have_written) {
  under_every_quick_schedule([] {
    run_over_mpi({0, 1}, [](Group& group, Gpu& gpu) {
      constexpr std::size_t kCount = 512;
      const auto stream = reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
      for (int round = 0; round < 5; ++round) {
        std::vector<int> mine(kCount, group.rank() + round);
        int* const data = gpu.put(mine);
        const auto sum = [&] {
          return group.start(
              gpu.operation(Kind::kAllReduce, DType::kInt32, data, data, kCount));  // staged
        };
        Operation from_0 = gpu.operation(Kind::kBroadcast, DType::kInt32, data, data, kCount);
        const auto first = sum();
        const auto second = group.start(from_0);  // over MPI; nobody waits between
        const auto third = sum();
        for (const auto& work : {first, second, third}) {
          work->wait(no_check);
          work->device_call()->order_before(stream);
        }
        CHECK(gpu.get(data, kCount) == std::vector<int>(kCount, 2 * (2 * round + 1)));
      }
    });
  });
}

TEST(double_catches_an_mpi_that_does_not_wait_for_the_gpu) {
  CHECK(needs_its_waits([](const auto& body) { run_over_mpi({0, 1}, body); }));
}

TEST(double_mpi_keeps_what_it_may_still_write_when_a_call_fails) {
  use_the_double();
  const auto before = gpu_double::census().allocations;
  const auto errors = run_ranks_catching(
      {0, 1},
      [&](Group& group) {
        Gpu gpu(group.rank());
        float* const data = gpu.put(values(group.rank(), 100));
        group.run(gpu.sum(data, 100), no_check);
        // Rank 0 waits for a message of rank 1, whose GPU hangs before that is sent.
        if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
        group.run(gpu.sum(gpu.put(Floats(100)), 100), no_check);
      },
      {.timeout_s = 0.5,
       .arena_bytes = std::size_t{64} << 20,
       .gpu_places = places_of_the_double(),
       .gpu_transport = Transport::kMpi,
       .mpi_problem = kAware},
      gpu_aware_channels(2));
  check_all(errors, "timeout after 0.");
  CHECK(errors[0].find("rank 1 to send") != std::string::npos);
  CHECK(errors[1].find("this rank's GPU to copy a piece") != std::string::npos);
  CHECK_EQUAL(gpu_double::errors(), "");
  CHECK_EQUAL(gpu_double::census().allocations, before + 2);
  gpu_double::forgive();
}

// What carries the calls.

TEST(double_auto_takes_mpi_if_no_rank_has_nccl) {
  for (const auto& hosts : {std::vector{0, 1}, {0, 0, 1}, {0, 1, 2}}) {
    const OldNccl everywhere(hosts.size());
    run_over_mpi(hosts, [](Group& group, Gpu& gpu) { CHECK(!is_staged(group, gpu)); },
                 {.transport = Transport::kAuto});
  }
}

TEST(double_auto_stages_if_one_rank_has_nccl_and_others_have_none) {
  const OldNccl on_rank_0(1);
  std::atomic<int> asked = 0;
  run_over_mpi({0, 1}, [](Group& group, Gpu& gpu) { CHECK(is_staged(group, gpu)); },
               {.transport = Transport::kAuto, .problem = [&] {
                  ++asked;
                  return std::string();
                }});
  CHECK_EQUAL(asked.load(), 0);
}

TEST(double_auto_stages_if_the_mpi_of_a_rank_takes_no_gpu_memory) {
  const OldNccl everywhere(3);
  for (const int lacking : {0, 1}) {
    std::atomic<int> asked = 0;
    run_over_mpi({0, 1}, [](Group& group, Gpu& gpu) { CHECK(is_staged(group, gpu)); },
                 {.transport = Transport::kAuto, .problem = [&asked, lacking] {
                    return asked++ == lacking ? kNotAware() : kAware();
                  }});
    CHECK_EQUAL(asked.load(), 2);  // once a rank
  }
}

TEST(double_auto_stages_inside_a_host_without_asking_mpi) {
  const OldNccl everywhere(2);
  std::atomic<int> asked = 0;
  run_over_mpi({0, 0}, [](Group& group, Gpu& gpu) { CHECK(is_staged(group, gpu)); },
               {.transport = Transport::kAuto, .problem = [&] {
                  ++asked;
                  return std::string();
                }});
  CHECK_EQUAL(asked.load(), 0);
}

TEST(double_mpi_that_takes_no_gpu_memory_is_refused_by_name_and_the_group_goes_on) {
  const auto ask = [](const pycomm::nccl::MpiProblem& problem, const std::string& text) {
    run_over_mpi({0, 0, 1},
                 [&](Group& group, Gpu& gpu) {
                   for (int round = 0; round < 2; ++round) {
                     float* const data = gpu.put(values(group.rank(), 8));
                     try {
                       group.run(gpu.sum(data, 8), no_check);
                       CHECK(!"refused");
                     } catch (const pycomm::InvalidArgumentError& error) {
                       const std::string said = error.what();
                       CHECK(said.find("MPI takes no pointers to GPU memory") != std::string::npos);
                       CHECK(said.find("rank 0: " + text) != std::string::npos);
                       CHECK(said.find("PYCOMM_MPI_CUDA=1") != std::string::npos);
                     }
                     CHECK(gpu.get(data, 8) == values(group.rank(), 8));
                     group.run({}, no_check);
                   }
                 },
                 {.problem = problem});
  };
  ask(kNotAware, "it was built without CUDA");
  ask([]() -> std::string { throw std::runtime_error("nobody can tell"); }, "nobody can tell");
  ask({}, "there is none");
}

TEST(double_mpi_never_meets_nccl) {
  run_over_mpi({0, 1}, [](Group& group, Gpu& gpu) {  // every rank has NCCL
    CHECK(!is_staged(group, gpu));
    CHECK_EQUAL(gpu_double::census().communicators, 0);
  });
}

TEST(double_mpi_moves_and_the_host_sums_where_a_rank_has_no_kernels) {
  auto places = places_of_the_double();
  places.kernels = "/nowhere";
  run_over_mpi({0, 1},
               [](Group& group, Gpu& gpu) {
                 check_like_host(group, gpu,
                                 call_of(group, Kind::kAllGather, DType::kFloat32, 500));
                 CHECK_EQUAL(gpu_double::census().pinned, 0);
                 group.run({}, no_check);
                 CHECK(is_staged(group, gpu));
               },
               {.places = places});
}
