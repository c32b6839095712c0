// GPU calls without NCCL, through the memory of the host, against the stand-in for libcudart
// (tests/double/). No GPU.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <iterator>
#include <random>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "like_host.h"
#include "nccl/pieces.h"

using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::ReduceOp;
using pycomm::nccl::Pieces;
using pycomm::nccl::Transport;

namespace {

const std::vector<std::vector<int>> kPlacements = {{0},       {0, 0},       {0, 0, 0},   {0, 1},
                                                   {0, 1, 2}, {0, 0, 0, 1}, {0, 1, 0, 1}};

/// Through the host, and on several hosts from GPU memory over MPI as well: what a call does is the
/// same.
std::vector<std::string> run_staged_catching(const std::vector<int>& hosts,
                                             const std::function<void(Group&, Gpu&)>& body,
                                             double timeout_s = 20) {
  auto errors = run_gpu_ranks_catching(hosts, body, timeout_s, places_of_the_double(),
                                       Transport::kStaged, kSmallSlots);
  if (*std::ranges::max_element(hosts) > 0) {
    std::ranges::move(run_over_mpi_catching(hosts, body, {.timeout_s = timeout_s}),
                      std::back_inserter(errors));
  }
  return errors;
}

void run_staged(const std::vector<int>& hosts, const std::function<void(Group&, Gpu&)>& body) {
  check_none(run_staged_catching(hosts, body));
}

/// In place, from the last rank.
template <typename T>
void broadcast_last(Group& group, const Gpu& gpu, T* data, std::size_t count) {
  Operation broadcast =
      gpu.operation(Kind::kBroadcast, DType::kUint8, data, data, count * sizeof(T));
  broadcast.root = group.size() - 1;
  group.run(broadcast, no_check);
}

}  // namespace

TEST(double_staged_calls_have_the_bits_of_the_host) {
  for (const auto& hosts : kPlacements) {
    run_staged(hosts, [](Group& group, Gpu& gpu) {
      for (const Kind kind :
           {Kind::kAllReduce, Kind::kBroadcast, Kind::kAllGather, Kind::kReduce, Kind::kGather,
            Kind::kScatter, Kind::kReduceScatter, Kind::kAllToAll}) {
        for (const std::size_t n : {0u, 1u, 5u, 1000u}) {
          check_like_host(group, gpu, call_of(group, kind, DType::kFloat32, n));
        }
      }
    });
  }
}

TEST(double_staged_calls_know_every_dtype_and_op) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 0, 1}}) {
    run_staged(hosts, [](Group& group, Gpu& gpu) {
      for (int dtype = 0; dtype <= static_cast<int>(DType::kFloat8E8M0Fnu); ++dtype) {
        const auto of = static_cast<DType>(dtype);
        check_like_host(group, gpu, call_of(group, Kind::kAllGather, of, 300));
        for (int number = 0; number <= static_cast<int>(ReduceOp::kBxor); ++number) {
          const auto op = static_cast<ReduceOp>(number);
          if (!pycomm::can_reduce(of, op)) continue;
          for (const Kind kind : {Kind::kAllReduce, Kind::kReduceScatter}) {
            Call call = call_of(group, kind, of, 300);
            call.operation.op = op;
            check_like_host(group, gpu, call);
            if (!pycomm::is_scalable(of)) continue;
            call.operation.prescale = 0.3;
            call.operation.postscale = 7;
            check_like_host(group, gpu, call);
          }
        }
      }
    });
  }
}

TEST(double_staged_calls_in_place) {
  for (const auto& hosts : kPlacements) {
    run_staged(hosts, [](Group& group, Gpu& gpu) {
      Call call = call_of(group, Kind::kAllReduce, DType::kBFloat16, 2000);
      call.in_place = true;
      check_like_host(group, gpu, call);

      // The root's tensor is where it was: not a byte of it is written.
      const bool is_root = group.rank() == group.size() - 1;
      std::byte* const data = is_root ? gpu.put(noise(99, 3000)) : gpu.room<std::byte>(3000);
      broadcast_last(group, gpu, data, 3000);
      CHECK(gpu.get<std::byte>(data, 3000) == noise(99, 3000));

      // This rank's block in its place among all.
      const auto size = static_cast<std::size_t>(group.size());
      const auto me = static_cast<std::size_t>(group.rank());
      auto* const all = gpu.room<std::byte>(size * 700);
      const Bytes mine = noise(group.rank(), 700);
      cudaMemcpyAsync(all + me * 700, mine.data(), 700, cudaMemcpyHostToDevice, gpu.stream());
      group.run(gpu.operation(Kind::kAllGather, DType::kUint8, all + me * 700, all, 700), no_check);
      Bytes everyone;
      for (int rank = 0; rank < group.size(); ++rank) {
        const Bytes theirs = noise(rank, 700);
        everyone.insert(everyone.end(), theirs.begin(), theirs.end());
      }
      CHECK(gpu.get(all, everyone.size()) == everyone);
    });
  }
}

TEST(double_staged_blocks_of_different_lengths_find_their_places) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0, 0}, {0, 0, 1}, {0, 1, 2}}) {
    run_staged(hosts, [](Group& group, Gpu& gpu) {
      // Rank r brings 100 r elements (rank 0 none), and sends 90 r + 40 s to rank s.
      const auto me = static_cast<std::size_t>(group.rank());
      for (const Kind kind : {Kind::kAllGather, Kind::kGather}) {
        Call gather = call_of(group, kind, DType::kFloat32, 100 * me);
        gather.operation.output_counts = {0, 100, 200};
        gather.output_count =
            gather.output_count == 0 && kind == Kind::kGather && me != 2 ? 0 : 300;
        check_like_host(group, gpu, gather);
      }
      Call exchange = call_of(group, Kind::kAllToAll, DType::kFloat32, 0);
      for (std::size_t peer = 0; peer < 3; ++peer) {
        exchange.operation.input_counts.push_back(90 * me + 40 * peer);
        exchange.operation.output_counts.push_back(90 * peer + 40 * me);
        exchange.input_count += exchange.operation.input_counts.back();
        exchange.output_count += exchange.operation.output_counts.back();
      }
      check_like_host(group, gpu, exchange);
    });
  }
}

TEST(double_staged_calls_lie_between_what_their_stream_had_before_and_gets_after) {
  under_every_quick_schedule([] {
    for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 0, 1}}) {
      run_staged(hosts, [](Group& group, Gpu& gpu) {
        for (const std::size_t count : {1u, 2000u}) {
          float* const data = gpu.put(values(group.rank(), count));
          group.run(gpu.sum(data, count), no_check);
          CHECK(gpu.get(data, count) == sums(group.size(), count));
        }
      });
    }
  });
}

TEST(double_staged_ranks_that_bring_nothing_do_not_write_too_early) {
  run_staged({0, 0}, [](Group& group, Gpu& gpu) {
    if (group.rank() == 0) gpu_double::hold(gpu.stream(), true);
    float* const data = gpu.put(values(group.rank(), 100));
    broadcast_last(group, gpu, data, 100);  // over on the host
    usleep(50000);
    gpu_double::hold(gpu.stream(), false);
    CHECK(gpu.get(data, 100) == values(1, 100));
  });
}

TEST(double_staged_calls_in_flight_keep_their_slots) {
  under_every_quick_schedule([] {
    run_staged({0, 0, 1}, [](Group& group, Gpu& gpu) {
      const auto other = group.duplicate(no_check);
      std::vector<float*> buckets;
      std::vector<std::shared_ptr<pycomm::Work>> works;
      for (std::size_t i = 0; i < 6; ++i) {
        buckets.push_back(gpu.put(values(group.rank(), 600 + i)));
        works.push_back((i % 2 == 0 ? group : *other).start(gpu.sum(buckets.back(), 600 + i)));
      }
      for (std::size_t i = 0; i < 6; ++i) {
        works[i]->wait(no_check);
        works[i]->device_call()->order_before(
            reinterpret_cast<pycomm::StreamAddress>(gpu.stream()));
        CHECK(gpu.get(buckets[i], 600 + i) == sums(3, 600 + i));
        CHECK(works[i]->device_call()->finished());
      }
    });
  });
}

TEST(double_staged_calls_read_what_calls_before_have_written) {
  under_every_quick_schedule([] {
    run_staged({0, 0}, [](Group& group, Gpu& gpu) {
      // Pieces of different lengths: what one piece of the sum reads, several of the other call
      // write.
      constexpr std::size_t kBlock = 256;
      for (int round = 0; round < 10; ++round) {
        float* const mine = gpu.put(Floats(kBlock, static_cast<float>(group.rank() + round)));
        float* const all = gpu.put(Floats(2 * kBlock, -1));
        const auto gather =
            group.start(gpu.operation(Kind::kAllGather, DType::kFloat32, mine, all, kBlock));
        const auto sum = group.start(gpu.sum(all, 2 * kBlock));  // nobody waits between
        for (const auto& work : {gather, sum}) {
          work->wait(no_check);
          work->device_call()->order_before(reinterpret_cast<pycomm::StreamAddress>(gpu.stream()));
        }
        Floats expected(kBlock, static_cast<float>(2 * round));
        expected.resize(2 * kBlock, static_cast<float>(2 * (1 + round)));
        CHECK(gpu.get(all, 2 * kBlock) == expected);
      }
    });
  });
}

// The tests above without a line that they are about: each must then fail.

TEST(double_catches_a_staged_call_that_waits_for_no_event) {
  for (const int priority : {highest_priority(), Gpu::kPriority}) {
    std::string failure;
    under_every_quick_schedule([&] {
      gpu_double::forget("cudaStreamWaitEvent", priority);
      failure += failure_of([] {
        run_staged({0, 0}, [](Group& group, Gpu& gpu) {
          float* const data = gpu.put(values(group.rank(), 2000));
          group.run(gpu.sum(data, 2000), no_check);
          CHECK(gpu.get(data, 2000) == sums(2, 2000));
        });
      });
      gpu_double::forget("");
    });
    CHECK(failure.find("sums(2, 2000)") != std::string::npos);
  }
}

TEST(double_catches_a_host_that_does_not_wait_for_the_copies) {
  CHECK(needs_its_waits([](const auto& body) { run_staged({0, 0}, body); }));
}

TEST(double_catches_pinned_memory_that_is_never_given_back) {
  gpu_double::forget("cudaHostUnregister");
  const std::string failure = failure_of([] {
    run_staged({0, 0}, [](Group& group, Gpu& gpu) {
      float* const data = gpu.put(Floats{1});
      group.run(gpu.sum(data, 1), no_check);
      gpu.get(data, 1);
    });
  });
  gpu_double::forget("");
  gpu_double::forgive();
  CHECK(failure.find("CHECK_EQUAL(left.pinned, 0)") != std::string::npos);
}

TEST(double_staged_calls_do_without_an_arena_that_can_be_pinned) {
  use_the_double();
  gpu_double::refuse_to_register(true);
  run_staged({0, 0, 1}, [](Group& group, Gpu& gpu) {
    float* const data = gpu.put(values(group.rank(), 2000));
    group.run(gpu.sum(data, 2000), no_check);
    CHECK(gpu.get(data, 2000) == sums(3, 2000));
  });
  gpu_double::refuse_to_register(false);
}

TEST(double_staged_ranks_may_share_a_gpu) {
  run_staged({0, 0, 1}, [](Group& group, Gpu&) {
    Gpu shared(group.rank() / 2);
    float* const data = shared.put(values(group.rank(), 2000));
    group.run(shared.sum(data, 2000), no_check);
    CHECK(shared.get(data, 2000) == sums(3, 2000));
  });
}

TEST(double_staged_buckets_live_as_long_as_somebody_holds_them) {
  run_staged({0, 0, 1}, [](Group& group, Gpu& gpu) {
    const auto stream = reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
    group.run(gpu.sum(gpu.room<float>(1), 1), no_check);  // has its slots now
    group.run({}, no_check);
    const auto before = gpu_double::census().allocations;
    group.run({}, no_check);
    {
      const auto bucket = group.allocate_on_device(4000, gpu.device(), stream, no_check);
      auto* const data = reinterpret_cast<float*>(bucket->data());
      CHECK(gpu.get(data, 1000) == Floats(1000));
      group.run(gpu.sum(data, 1000), no_check);
      CHECK(gpu.get(data, 1000) == Floats(1000));
    }
    for (int i = 0; i < 1000 && gpu_double::census().allocations > before; ++i) usleep(10000);
    CHECK(gpu_double::census().allocations <= before);
  });
}

TEST(double_staged_a_mismatch_is_found_before_anything_is_copied) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() < 2) continue;
    const auto errors = run_staged_catching(hosts, [](Group& group, Gpu& gpu) {
      float* const data = gpu.put(values(group.rank(), 8));
      group.run(gpu.sum(data, group.rank() == 1 ? 7 : 8), no_check);
    });
    check_all(errors, "differs: rank");
    check_all(errors, "all_reduce of 7 float32, SUM, on GPUs");
  }
}

TEST(double_staged_blocks_that_do_not_match_are_an_error_on_every_rank) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 1}}) {
    const auto errors = run_staged_catching(hosts, [](Group& group, Gpu& gpu) {
      // Rank 0 sends more than rank 1 expects, in a late piece.
      const std::size_t more = group.rank() == 0 ? 1 : 0;
      Operation exchange = gpu.operation(Kind::kAllToAll, DType::kFloat32,
                                         gpu.put(Floats(400 + more)), gpu.room<float>(400), 0);
      exchange.input_counts = {200, 200 + more};
      exchange.output_counts = {200, 200};
      group.run(exchange, no_check);
    });
    check_all(errors, "rank 0 sends");
  }
}

TEST(double_staged_a_gpu_that_hangs_before_the_call_is_a_timeout_on_every_rank) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 0, 1}}) {
    const auto errors = run_staged_catching(
        hosts,
        [](Group& group, Gpu& gpu) {
          float* const data = gpu.put(Floats{1});
          if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
          group.run(gpu.sum(data, 1), no_check);
        },
        /*timeout_s=*/0.5);
    check_all(errors, "timeout after 0.");
    check_all(errors, "all_reduce of 1 float32, SUM");
  }
}

TEST(double_staged_a_gpu_that_hangs_after_the_last_piece_is_a_timeout_on_every_rank) {
  const auto errors = run_staged_catching(
      {0, 0},
      [](Group& group, Gpu& gpu) {
        // Rank 0 has nothing to copy down, so its host comes to the end of the call.
        if (group.rank() == 0) gpu_double::hold(gpu.stream(), true);
        broadcast_last(group, gpu, gpu.put(Floats{1, 2}), 2);
        for (int i = 0; i < 1000; ++i) {
          group.check_notices();
          usleep(10000);
        }
      },
      /*timeout_s=*/0.5);
  check_all(errors, "timeout after 0.");
  check_all(errors, "and the GPU has not finished it");
}

TEST(double_staged_a_gpu_that_hangs_to_the_end_keeps_what_it_was_given) {
  use_the_double();
  cudaSetDevice(1);
  cudaStream_t hung = nullptr;
  cudaStreamCreateWithPriority(&hung, cudaStreamNonBlocking, Gpu::kPriority);
  gpu_double::hold(hung, true);
  void* data = nullptr;
  cudaMalloc(&data, 1000);
  cudaMemsetAsync(data, 0, 1000, hung);
  const auto before = gpu_double::census();
  const auto errors = run_ranks_catching(
      {0, 0},
      [&](Group& group) {
        Gpu gpu(group.rank());
        float* const mine = gpu.room<float>(250);
        const bool hangs = group.rank() == 1;
        Operation sum = gpu.sum(hangs ? static_cast<float*>(data) : mine, 250);
        if (hangs) sum.stream = reinterpret_cast<pycomm::StreamAddress>(hung);
        group.run(sum, no_check);
      },
      /*timeout_s=*/0.3, {}, {{}, {}, DOUBLE_IMAGE}, Transport::kStaged);
  check_all(errors, "timeout after 0.");
  // Neither a stream with work on it nor the memory that the work will write is gone.
  CHECK_EQUAL(gpu_double::errors(), "");
  CHECK_EQUAL(gpu_double::census().pinned, before.pinned + 1);
  CHECK_EQUAL(gpu_double::census().streams, before.streams + 3);  // the device's too
  gpu_double::hold(hung, false);
  cudaDeviceSynchronize();
  CHECK_EQUAL(gpu_double::errors(), "");
  cudaStreamDestroy(hung);
  cudaFree(data);
  gpu_double::forgive();
}

TEST(double_staged_a_rank_that_never_comes_is_a_timeout) {
  const auto errors = run_staged_catching(
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

TEST(double_staged_a_failure_elsewhere_ends_a_call_between_its_pieces) {
  const auto errors = run_staged_catching({0, 0, 0}, [](Group& group, Gpu& gpu) {
    float* const data = gpu.put(Floats(2000));
    group.run(gpu.sum(data, 2000), no_check);
    if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);  // waits for the copy down
    const auto work = group.start(gpu.sum(data, 2000));
    if (group.rank() == 2) {
      usleep(100000);
      throw std::runtime_error("an exception in the training loop");
    }
    work->wait(no_check);
  });
  check_all(errors, "an exception in the training loop");
}

// What carries the calls.

TEST(double_auto_takes_nccl_if_every_rank_has_it) {
  for (const auto& hosts : kPlacements) {
    run_gpu_ranks(
        hosts,
        [](Group& group, Gpu& gpu) {
          for (int round = 0; round < 2; ++round) {
            float* const data = gpu.put(values(group.rank(), 100));
            group.run(gpu.sum(data, 100), no_check);
            CHECK(gpu.get(data, 100) == sums(group.size(), 100));
            CHECK_EQUAL(gpu_double::census().communicators > 0, true);
          }
        },
        Transport::kAuto);
  }
}

TEST(double_auto_stages_on_every_rank_if_one_has_no_nccl) {
  use_the_double();
  for (const auto& hosts : kPlacements) {
    gpu_double::set_nccl_version(static_cast<int>(hosts.size()) - 1, 21703);  // too old
    run_gpu_ranks(
        hosts,
        [](Group& group, Gpu& gpu) {
          for (int round = 0; round < 2; ++round) {
            // int16 is more than NCCL can.
            check_like_host(group, gpu, call_of(group, Kind::kAllReduce, DType::kInt16, 2000));
            CHECK_EQUAL(gpu_double::census().communicators, 0);
          }
        },
        Transport::kAuto, kSmallSlots);
    gpu_double::set_nccl_version(static_cast<int>(hosts.size()) - 1, 0);
  }
}

TEST(double_auto_refuses_nccls_that_differ) {
  use_the_double();
  gpu_double::set_nccl_version(1, 22803);
  gpu_double::set_nccl_version(0, 22907);
  run_gpu_ranks(
      {0, 0},
      [](Group& group, Gpu& gpu) {
        for (int attempt = 0; attempt < 2; ++attempt) {
          float* const data = gpu.put(Floats{1});
          CHECK_THROWS(group.run(gpu.sum(data, 1), no_check), pycomm::InvalidArgumentError,
                       "rank 0 has NCCL 2.29.7 and rank 1 has 2.28.3");
        }
      },
      Transport::kAuto);
  gpu_double::set_nccl_version(0, 0);
  gpu_double::set_nccl_version(1, 0);
}

TEST(double_auto_names_the_call_in_a_mismatch) {
  const auto errors = run_gpu_ranks_catching(
      {0, 0, 1},
      [](Group& group, Gpu& gpu) {
        float* const data = gpu.put(Floats{1, 2});
        group.run(gpu.sum(data, group.rank() == 1 ? 1 : 2), no_check);
      },
      20, places_of_the_double(), Transport::kAuto);
  check_all(errors, "call #1 differs: rank");
  check_all(errors, "all_reduce of 1 float32, SUM, on GPUs");
}

// How tensors are cut.

TEST(pieces_tile_the_tensors_and_fit_their_slot) {
  constexpr std::size_t kSlot = 1024;
  for (const Kind kind : {Kind::kAllReduce, Kind::kBroadcast, Kind::kAllGather, Kind::kReduce,
                          Kind::kGather, Kind::kScatter, Kind::kReduceScatter, Kind::kAllToAll}) {
    for (const int size : {1, 3, 8}) {
      for (int rank = 0; rank < size; ++rank) {
        const auto blocks = static_cast<std::size_t>(size);
        constexpr std::size_t kCount = 333;
        Bytes input(kCount * blocks * 4);
        Bytes output(kCount * blocks * 4);
        Operation operation;
        operation.kind = kind;
        operation.dtype = DType::kFloat32;
        operation.count = kCount;
        operation.input = input.data();
        operation.output = output.data();
        const Pieces pieces(operation, rank, size, kSlot);
        Bytes slot(kSlot);
        std::vector<int> read(input.size());
        std::vector<int> written(output.size());
        for (std::size_t i = 0; i < pieces.count(kCount); ++i) {
          for (const auto& copy : pieces.down(i, slot.data())) {
            CHECK(copy.to >= slot.data() && copy.to + copy.bytes <= slot.data() + kSlot);
            for (std::size_t at = 0; at < copy.bytes; ++at) {
              ++read.at(static_cast<std::size_t>(copy.from - input.data()) + at);
            }
          }
          for (const auto& copy : pieces.up(i, slot.data())) {
            CHECK(copy.from >= slot.data() && copy.from + copy.bytes <= slot.data() + kSlot);
            for (std::size_t at = 0; at < copy.bytes; ++at) {
              ++written.at(static_cast<std::size_t>(copy.to - output.data()) + at);
            }
          }
        }
        const auto once = [](const std::vector<int>& touched, std::size_t bytes) {
          for (std::size_t at = 0; at < touched.size(); ++at) {
            if (touched[at] != (at < bytes ? 1 : 0)) return false;
          }
          return true;
        };
        const bool is_root = rank == 0;
        const std::size_t one = kCount * 4;
        const bool brings_all = kind == Kind::kReduceScatter || kind == Kind::kAllToAll ||
                                (kind == Kind::kScatter && is_root);
        const bool brings_nothing =
            (kind == Kind::kScatter || kind == Kind::kBroadcast) && !is_root;
        const bool gets_all = kind == Kind::kAllGather || kind == Kind::kAllToAll ||
                              (kind == Kind::kGather && is_root);
        const bool gets_nothing = (kind == Kind::kGather || kind == Kind::kReduce) && !is_root;
        CHECK(once(read, brings_nothing ? 0 : brings_all ? one * blocks : one));
        CHECK(once(written, gets_nothing ? 0 : gets_all ? one * blocks : one));
      }
    }
  }
}
