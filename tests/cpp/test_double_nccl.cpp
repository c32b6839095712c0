// GPU calls of the core against the stand-ins for libcudart and libnccl (tests/double/). No GPU.

#include <nccl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <thread>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::ReduceOp;

namespace {

const std::vector<std::vector<int>> kPlacements = {{0},    {0, 0},       {0, 0, 0},
                                                   {0, 1}, {0, 0, 0, 1}, {0, 1, 0, 1}};

void cpu_all_reduce_works(Group& group) {
  float one = 1;
  Operation operation;
  operation.kind = Kind::kAllReduce;
  operation.dtype = DType::kFloat32;
  operation.input = reinterpret_cast<std::byte*>(&one);
  operation.output = reinterpret_cast<std::byte*>(&one);
  operation.count = 1;
  group.run(operation, no_check);
  CHECK_EQUAL(one, static_cast<float>(group.size()));
}

}  // namespace

TEST(double_a_call_lies_between_what_its_stream_had_before_and_gets_after) {
  under_every_schedule([] {
    for (const auto& hosts : kPlacements) {
      run_gpu_ranks(hosts, [](Group& group, Gpu& gpu) {
        for (const std::size_t count : {1u, 5u, 1000u}) {
          float* const data = gpu.put(values(group.rank(), count));
          group.run(gpu.sum(data, count), no_check);
          CHECK(gpu.get(data, count) == sums(group.size(), count));
        }
      });
    }
  });
}

TEST(double_calls_in_flight_end_in_the_order_of_their_streams) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0, 0}, [](Group& group, Gpu& gpu) {
      std::vector<float*> buckets;
      std::vector<std::shared_ptr<pycomm::Work>> works;
      for (std::size_t i = 0; i < 6; ++i) {
        buckets.push_back(gpu.put(values(group.rank(), 100 + i)));
        works.push_back(group.start(gpu.sum(buckets.back(), 100 + i)));
      }
      for (std::size_t i = 0; i < 6; ++i) {
        works[i]->wait(no_check);
        works[i]->device_call()->order_before(
            reinterpret_cast<pycomm::StreamAddress>(gpu.stream()));
        CHECK(gpu.get(buckets[i], 100 + i) == sums(3, 100 + i));
        CHECK(works[i]->device_call()->finished());
      }
    });
  });
}

TEST(double_every_collective_moves_what_it_should) {
  for (const auto& hosts : kPlacements) {
    run_gpu_ranks(hosts, [](Group& group, Gpu& gpu) {
      const int p = group.size();
      const auto size = static_cast<std::size_t>(p);
      const std::size_t n = 7;
      const int me = group.rank();
      const int root = p - 1;
      const auto run = [&](Kind kind, float* in, float* out, std::size_t count) {
        Operation operation = gpu.operation(kind, DType::kFloat32, in, out, count);
        operation.root = root;
        group.run(operation, no_check);
      };
      Floats everyone;  // the ranks' values end to end
      for (int rank = 0; rank < p; ++rank) {
        const Floats one = values(rank, n);
        everyone.insert(everyone.end(), one.begin(), one.end());
      }
      float* const mine = gpu.put(values(me, n));
      float* const all = gpu.put(everyone);
      float* const one = gpu.room<float>(n);
      float* const many = gpu.room<float>(n * size);

      run(Kind::kBroadcast, mine, one, n);
      CHECK(gpu.get(one, n) == values(root, n));
      run(Kind::kAllGather, mine, many, n);
      CHECK(gpu.get(many, n * size) == everyone);
      float* const gathered = gpu.room<float>(n * size);
      run(Kind::kGather, mine, me == root ? gathered : nullptr, n);
      if (me == root) CHECK(gpu.get(gathered, n * size) == everyone);
      run(Kind::kScatter, me == root ? all : nullptr, one, n);
      CHECK(gpu.get(one, n) == values(me, n));
      run(Kind::kReduce, mine, me == root ? one : nullptr, n);
      if (me == root) CHECK(gpu.get(one, n) == sums(p, n));
      run(Kind::kReduceScatter, all, one, n);
      Floats scaled = values(me, n);
      for (float& value : scaled) value *= static_cast<float>(p);
      CHECK(gpu.get(one, n) == scaled);

      // Block s of rank r is (r, s): rank r then has (0, r), (1, r), ...
      Floats sent(n * size);
      Floats expected(n * size);
      for (std::size_t i = 0; i < sent.size(); ++i) {
        sent[i] = static_cast<float>(me * 100 + static_cast<int>(i / n));
        expected[i] = static_cast<float>(static_cast<int>(i / n) * 100 + me);
      }
      run(Kind::kAllToAll, gpu.put(sent), many, n);
      CHECK(gpu.get(many, n * size) == expected);
    });
  }
}

TEST(double_blocks_of_different_lengths_find_their_places) {
  run_gpu_ranks({0, 0, 1}, [](Group& group, Gpu& gpu) {
    // Rank r brings r elements (rank 0 none), and sends r + s to rank s.
    const auto me = static_cast<std::size_t>(group.rank());
    Operation gather = gpu.operation(Kind::kAllGather, DType::kFloat32,
                                     gpu.put(Floats(me + 1, float(me))), gpu.room<float>(3), me);
    gather.output_counts = {0, 1, 2};
    group.run(gather, no_check);
    CHECK(gpu.get(reinterpret_cast<float*>(gather.output), 3) == Floats({1, 2, 2}));

    Floats sent;
    Floats expected;
    Operation exchange = gpu.operation(Kind::kAllToAll, DType::kFloat32, nullptr, nullptr, 0);
    for (std::size_t peer = 0; peer < 3; ++peer) {
      exchange.input_counts.push_back(me + peer);
      exchange.output_counts.push_back(me + peer);
      sent.insert(sent.end(), me + peer, static_cast<float>(10 * me + peer));
      expected.insert(expected.end(), me + peer, static_cast<float>(10 * peer + me));
    }
    exchange.input = reinterpret_cast<std::byte*>(gpu.put(sent));
    exchange.output = reinterpret_cast<std::byte*>(gpu.room<float>(expected.size()));
    group.run(exchange, no_check);
    CHECK(gpu.get(reinterpret_cast<float*>(exchange.output), expected.size()) == expected);
  });
}

TEST(double_sums_are_scaled_and_ops_are_those_asked_for) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    const float mine = group.rank() == 0 ? 8.0F : 2.0F;
    const auto reduced = [&](ReduceOp op, double prescale) {
      float* const data = gpu.put(Floats{mine});
      Operation operation = gpu.sum(data, 1);
      operation.op = op;
      operation.prescale = prescale;
      group.run(operation, no_check);
      return gpu.get(data, 1)[0];
    };
    CHECK_EQUAL(reduced(ReduceOp::kSum, 1), 10);
    CHECK_EQUAL(reduced(ReduceOp::kAvg, 1), 5);
    CHECK_EQUAL(reduced(ReduceOp::kSum, 0.25), 2.5);
    CHECK_EQUAL(reduced(ReduceOp::kMin, 1), 2);
    CHECK_EQUAL(reduced(ReduceOp::kMax, 1), 8);
    CHECK_EQUAL(reduced(ReduceOp::kProd, 1), 16);

    auto* const halves = gpu.put(std::vector<std::uint16_t>{0x4000, 0x3C00});  // 2 and 1
    Operation average = gpu.operation(Kind::kAllReduce, DType::kFloat16, halves, halves, 2);
    average.op = ReduceOp::kAvg;
    group.run(average, no_check);
    CHECK(gpu.get(halves, 2) == (std::vector<std::uint16_t>{0x4000, 0x3C00}));

    auto* const truths = gpu.put(std::vector<std::uint8_t>{group.rank() == 0, 0, 1});
    Operation any = gpu.operation(Kind::kAllReduce, DType::kBool, truths, truths, 3);
    group.run(any, no_check);
    CHECK(gpu.get(truths, 3) == (std::vector<std::uint8_t>{1, 0, 1}));

    float* const complex = gpu.put(Floats{mine, -mine});
    group.run(gpu.operation(Kind::kAllReduce, DType::kComplex64, complex, complex, 1), no_check);
    CHECK(gpu.get(complex, 2) == Floats({10, -10}));
  });
}

TEST(double_groups_used_in_opposite_orders_launch_in_one) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0, 0}, [](Group& group, Gpu& gpu) {
      const auto other = group.duplicate(no_check);
      for (int round = 0; round < 10; ++round) {
        float* const first = gpu.put(values(group.rank(), 50));
        float* const second = gpu.put(values(group.rank(), 60));
        std::vector<std::shared_ptr<pycomm::Work>> works;
        const bool swapped = (group.rank() + round) % 2 != 0;
        if (swapped) works.push_back(other->start(gpu.sum(second, 60)));
        works.push_back(group.start(gpu.sum(first, 50)));
        if (!swapped) works.push_back(other->start(gpu.sum(second, 60)));
        for (const auto& work : works) {
          work->wait(no_check);
          work->device_call()->order_before(reinterpret_cast<pycomm::StreamAddress>(gpu.stream()));
        }
        CHECK(gpu.get(first, 50) == sums(3, 50));
        CHECK(gpu.get(second, 60) == sums(3, 60));
      }
    });
  });
}

// The tests above without the line that they are about: each must then fail. (The line is taken
// away by the double, which forgets the call.)

TEST(double_catches_a_call_that_does_not_wait_for_its_stream) {
  std::string failure;
  under_every_schedule([&] {
    gpu_double::forget("cudaStreamWaitEvent", highest_priority());
    failure += failure_of([] {
      run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
        float* const data = gpu.put(values(group.rank(), 100));
        group.run(gpu.sum(data, 100), no_check);
        CHECK(gpu.get(data, 100) == sums(2, 100));
      });
    });
    gpu_double::forget("");
  });
  CHECK(failure.find("sums(2, 100)") != std::string::npos);
}

TEST(double_catches_a_stream_that_does_not_wait_for_the_call) {
  std::string failure;
  under_every_schedule([&] {
    gpu_double::forget("cudaStreamWaitEvent", Gpu::kPriority);
    failure += failure_of([] {
      run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
        float* const data = gpu.put(values(group.rank(), 100));
        group.run(gpu.sum(data, 100), no_check);
        CHECK(gpu.get(data, 100) == sums(2, 100));
      });
    });
    gpu_double::forget("");
  });
  CHECK(failure.find("sums(2, 100)") != std::string::npos);
}

TEST(double_catches_what_is_never_freed) {
  for (const char* const function : {"ncclCommDestroy", "cudaEventDestroy"}) {
    const auto before = gpu_double::census();
    gpu_double::forget(function);
    const std::string failure = failure_of([] {
      run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
        float* const data = gpu.put(Floats{1});
        group.run(gpu.sum(data, 1), no_check);
        gpu.get(data, 1);
      });
    });
    gpu_double::forget("");
    const auto after = gpu_double::census();
    CHECK(failure.find("CHECK_EQUAL(left.") != std::string::npos);
    CHECK(after.communicators + after.events > before.communicators + before.events);
    gpu_double::forgive();
  }
}

TEST(double_blocks_that_do_not_match_are_an_error_on_every_rank_before_the_launch) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 1}}) {
    const auto errors = run_gpu_ranks_catching(hosts, [](Group& group, Gpu& gpu) {
      const std::size_t more = group.rank() == 0 ? 1 : 0;
      Operation exchange = gpu.operation(Kind::kAllToAll, DType::kFloat32,
                                         gpu.put(Floats(8 + more)), gpu.room<float>(8), 0);
      exchange.input_counts = {4, 4 + more};
      exchange.output_counts = {4, 4};
      group.run(exchange, no_check);
    });
    check_all(errors, "rank 0 sends 5");
  }
}

TEST(double_catches_ranks_that_call_nccl_with_different_counts) {
  // Around the group, which would not let it come to that.
  use_the_double();
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([rank, id] {
      Gpu gpu(rank);
      float* const data = gpu.put(values(rank, 8));
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      config.blocking = 0;
      ncclComm_t communicator = nullptr;
      ncclCommInitRankConfig(&communicator, 2, id, rank, &config);
      ncclResult_t state = ncclInProgress;
      const auto settle = [&] {
        do {
          ncclCommGetAsyncError(communicator, &state);
        } while (state == ncclInProgress);
      };
      settle();
      const std::size_t count = rank == 0 ? 8 : 7;
      ncclAllReduce(data, data, count, ncclFloat32, ncclSum, communicator, gpu.stream());
      settle();
      gpu.get(data, 8);
      settle();
      CHECK_EQUAL(state, ncclInvalidUsage);
      ncclCommAbort(communicator);
    });
  }
  for (auto& rank : ranks) rank.join();
  CHECK_EQUAL(gpu_double::errors(), "ranks made different calls: 8 and 7 elements\n");
}

TEST(double_a_mismatch_is_found_before_anything_is_launched) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() < 2) continue;
    const auto errors = run_gpu_ranks_catching(hosts, [](Group& group, Gpu& gpu) {
      float* const data = gpu.put(values(group.rank(), 8));
      group.run(gpu.sum(data, group.rank() == 1 ? 7 : 8), no_check);
    });
    check_all(errors, "differs: rank");
    check_all(errors, "all_reduce of 7 float32, SUM, on GPUs");
  }
}

TEST(double_a_cpu_tensor_on_one_rank_is_a_mismatch_that_says_so) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    float host = 0;
    float* const data = gpu.put(Floats{1});
    Operation operation = gpu.sum(data, 1);
    if (group.rank() == 1) {
      operation.device = -1;
      operation.input = reinterpret_cast<std::byte*>(&host);
      operation.output = reinterpret_cast<std::byte*>(&host);
    }
    group.run(operation, no_check);
  });
  check_all(errors, "has its tensors on GPUs on every rank, or on none");
}

TEST(double_what_the_host_must_not_read_it_cannot) {
  use_the_double();
  Gpu gpu(0);
  const float* const data = gpu.put(Floats{1});
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    _exit(*static_cast<const volatile float*>(data) == 1 ? 1 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

TEST(double_a_gpu_that_hangs_is_a_timeout_on_every_rank_and_leaves_nothing) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 0, 1}}) {
    const auto errors = run_gpu_ranks_catching(
        hosts,
        [](Group& group, Gpu& gpu) {
          float* const data = gpu.put(Floats{1});
          group.run(gpu.sum(data, 1), no_check);  // connects
          gpu.get(data, 1);
          if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
          group.run(gpu.sum(data, 1), no_check);  // over with its launch
          for (int i = 0; i < 1000; ++i) {
            group.check_notices();
            usleep(10000);
          }
        },
        /*timeout_s=*/0.5);
    check_all(errors, "timeout after 0.");
    check_all(errors, "and the GPU has not finished it");
    check_all(errors, "all_reduce of 1 float32, SUM, on GPUs (call #3) on rank ");
  }
}

TEST(double_a_rank_that_never_comes_is_a_timeout_before_the_launch) {
  const auto errors = run_gpu_ranks_catching(
      {0, 0},
      [](Group& group, Gpu& gpu) {
        float* const data = gpu.put(Floats{1});
        if (group.rank() == 0) group.run(gpu.sum(data, 1), no_check);
        if (group.rank() == 1) {
          usleep(800000);
          group.check_notices();
        }
      },
      /*timeout_s=*/0.3);
  check_all(errors, "waiting for rank 1");
}

TEST(double_a_failure_elsewhere_aborts_what_is_on_the_gpu) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    float* const data = gpu.put(Floats{1});
    group.run(gpu.sum(data, 1), no_check);
    gpu.get(data, 1);
    if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
    group.run(gpu.sum(data, 1), no_check);
    if (group.rank() == 1) throw std::runtime_error("an exception in the training loop");
    gpu.get(data, 1);  // would wait for ever for the kernel
    group.check_notices();
  });
  check_all(errors, "an exception in the training loop");
}

TEST(double_a_peer_that_nccl_has_lost_is_a_lost_peer) {
  bool is_told_as_such = false;
  const auto errors = run_gpu_ranks_catching({0, 0}, [&](Group& group, Gpu& gpu) {
    float* const data = gpu.put(Floats{1});
    group.run(gpu.sum(data, 1), no_check);
    gpu.get(data, 1);
    if (group.rank() == 0) gpu_double::set_nccl_error(gpu.device(), ncclRemoteError);
    try {
      group.run(gpu.sum(data, 1), no_check);  // rank 0's waits for NCCL to take it
    } catch (const pycomm::PeerLostError&) {
      if (group.rank() == 0) is_told_as_such = true;
      throw;
    }
    for (int i = 0; i < 1000; ++i) {
      group.check_notices();
      usleep(10000);
    }
  });
  gpu_double::set_nccl_error(0, 0);
  CHECK(is_told_as_such);
  check_all(
      errors,
      "all_reduce of 1 float32, SUM, on GPUs (call #3) on rank 0: NCCL: a call before failed");
}

TEST(double_two_ranks_on_one_gpu_are_refused_everywhere_and_cpus_go_on) {
  run_gpu_ranks({0, 0, 0}, [](Group& group, Gpu&) {
    Gpu shared(group.rank() == 0 ? 0 : 1);  // ranks 1 and 2 have one
    float* const data = shared.put(Floats{1});
    CHECK_THROWS(group.run(shared.sum(data, 1), no_check), pycomm::InvalidArgumentError,
                 "ranks 1 and 2 both use GPU 0000:11:00.0 of one host");
    cpu_all_reduce_works(group);
  });
}

TEST(double_different_versions_of_nccl_are_refused_everywhere) {
  use_the_double();
  gpu_double::set_nccl_version(1, 22803);
  gpu_double::set_nccl_version(0, 22907);
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      float* const data = gpu.put(Floats{1});
      CHECK_THROWS(group.run(gpu.sum(data, 1), no_check), pycomm::InvalidArgumentError,
                   "rank 0 has NCCL 2.29.7 and rank 1 has 2.28.3");
      cpu_all_reduce_works(group);
    }
  });
  gpu_double::set_nccl_version(0, 0);
  gpu_double::set_nccl_version(1, 0);
}

TEST(double_an_nccl_that_is_too_old_on_one_rank_is_told_on_all) {
  use_the_double();
  gpu_double::set_nccl_version(1, 21703);
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    float* const data = gpu.put(Floats{1});
    CHECK_THROWS(group.run(gpu.sum(data, 1), no_check), pycomm::InvalidArgumentError,
                 "rank 1 cannot use NCCL: NCCL: ");
    cpu_all_reduce_works(group);
  });
  gpu_double::set_nccl_version(1, 0);
}

TEST(double_what_nccl_cannot_do_is_refused_by_name_and_the_group_goes_on) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    float* const data = gpu.put(values(group.rank(), 4));
    const auto refused = [&](DType dtype, ReduceOp op, double prescale, const char* part) {
      Operation operation = gpu.operation(Kind::kAllReduce, dtype, data, data, 1);
      operation.op = op;
      operation.prescale = prescale;
      CHECK_THROWS(group.run(operation, no_check), pycomm::InvalidArgumentError, part);
    };
    refused(DType::kInt16, ReduceOp::kSum, 1, "NCCL cannot reduce int16");
    refused(DType::kInt32, ReduceOp::kBxor, 1, "NCCL has no BXOR for int32");
    refused(DType::kFloat32, ReduceOp::kMax, 2, "NCCL scales sums only, and op is MAX");
    Operation ring = gpu.sum(data, 4);
    ring.algorithm = pycomm::Algorithm::kRing;
    CHECK_THROWS(group.run(ring, no_check), pycomm::InvalidArgumentError, "algorithm is ring");
    group.run(gpu.sum(data, 4), no_check);
    Operation elsewhere = gpu.sum(data, 4);
    elsewhere.device = 5;
    CHECK_THROWS(group.run(elsewhere, no_check), pycomm::InvalidArgumentError,
                 "the tensor is on GPU 5, and this rank communicates from GPU");
    CHECK(gpu.get(data, 4) == sums(2, 4));
  });
}
