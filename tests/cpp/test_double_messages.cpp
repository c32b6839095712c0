// Messages between GPUs against the stand-ins for libcudart and libnccl (tests/double/). No GPU.

#include <nccl.h>
#include <unistd.h>

#include <string>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "like_host.h"
#include "mailer.h"

using pycomm::DType;
using pycomm::Group;
using pycomm::Transfer;
using pycomm::TransferWork;
using pycomm::nccl::Transport;
using Works = std::vector<std::shared_ptr<TransferWork>>;

namespace {

const std::vector<std::vector<int>> kPlacements = {{0, 0}, {0, 1}, {0, 0, 1}, {0, 1, 0, 1}};

/// On NCCL, and through the memory of the hosts: what a message does is the same.
void run_mailers(const std::vector<int>& hosts, const std::function<void(const Mailer&)>& body) {
  for (const Transport transport : {Transport::kNccl, Transport::kStaged}) {
    gpu_double::set_patience(std::chrono::milliseconds(transport == Transport::kNccl ? 100 : 1));
    check_none(run_mailers_catching(hosts, body, 20, transport));
  }
  gpu_double::set_patience(std::chrono::milliseconds(100));
}

void one_message(const Mailer& me, std::size_t count) {
  if (me.group.rank() == 0) {
    float* const data = me.gpu.put(values(0, count));
    me.run(me.to(1, data, count));
    cudaMemcpyAsync(data, me.gpu.put(Floats(count, -1)), count * sizeof(float),
                    cudaMemcpyDeviceToDevice, me.gpu.stream());  // it is mine again
  } else if (me.group.rank() == 1) {
    float* const data = me.gpu.put(Floats(count, -2));
    CHECK_EQUAL(me.run(me.from(0, data, count)), 0);
    CHECK(me.gpu.get(data, count) == values(0, count));
  }
}

}  // namespace

TEST(double_a_message_lies_between_what_its_streams_had_before_and_get_after) {
  under_every_schedule([] {
    for (const auto& hosts : kPlacements) {
      run_mailers(hosts, [](const Mailer& me) {
        for (const std::size_t count : {1u, 5u, 1000u, 0u}) one_message(me, count);
      });
    }
  });
}

TEST(double_messages_in_both_directions_between_all_ranks_do_not_wait_for_each_other) {
  under_every_schedule([] {
    for (const auto& hosts : kPlacements) {
      run_mailers(hosts, [](const Mailer& me) {
        // Ranks send in orders of their own, and receive by tag in another.
        const int p = me.group.size();
        const int rank = me.group.rank();
        Works works;
        std::vector<std::pair<float*, Floats>> arriving;
        for (int step = 0; step < p; ++step) {
          const int peer = (rank + step) % p;  // itself first
          for (int tag = 0; tag < 3; ++tag) {
            const std::size_t count = 10 + static_cast<std::size_t>(tag);
            works.push_back(
                me.start(me.to(peer, me.gpu.put(values(rank * 3 + tag, count)), count, tag)));
          }
          for (int tag = 2; tag >= 0; --tag) {
            const std::size_t count = 10 + static_cast<std::size_t>(tag);
            arriving.emplace_back(me.gpu.room<float>(count), values(peer * 3 + tag, count));
            works.push_back(me.start(me.from(peer, arriving.back().first, count, tag)));
          }
        }
        for (const auto& work : works) me.wait(work);
        for (const auto& [data, expected] : arriving) {
          CHECK(me.gpu.get(data, expected.size()) == expected);
        }
      });
    }
  });
}

TEST(double_more_messages_than_a_batch_holds_arrive_in_the_order_they_were_sent) {
  run_mailers({0, 1}, [](const Mailer& me) {
    constexpr int kMessages = 3 * static_cast<int>(pycomm::GpuMail::kMostInBatch) + 1;
    const int peer = 1 - me.group.rank();
    Works works;
    std::vector<float*> arriving;
    for (int i = 0; i < kMessages; ++i) {
      works.push_back(me.start(me.to(peer, me.gpu.put(Floats{float(i)}), 1)));
    }
    for (int i = 0; i < kMessages; ++i) {
      arriving.push_back(me.gpu.room<float>(1));
      works.push_back(me.start(me.from(peer, arriving.back(), 1)));
    }
    for (const auto& work : works) me.wait(work);
    for (int i = 0; i < kMessages; ++i) {
      CHECK_EQUAL(me.gpu.get(arriving[static_cast<std::size_t>(i)], 1)[0], float(i));
    }
  });
}

TEST(double_a_pipeline_passes_activations_down_and_gradients_up) {
  // One forward, one backward: stage s warms up with p-1-s forwards, as pycomm/pipeline does.
  under_every_schedule([] {
    for (const auto& hosts : kPlacements) {
      run_mailers(hosts, [](const Mailer& me) {
        constexpr int kMicroBatches = 6;
        constexpr std::size_t n = 20;
        const int p = me.group.size();
        const int stage = me.group.rank();
        Works sent;
        float* const total = me.gpu.put(Floats(n));
        const auto forward = [&](int batch) {
          float* const data = me.gpu.put(values(batch, n));
          if (stage > 0) me.run(me.from(stage - 1, data, n, batch));
          me.add_one(data, n);
          if (stage < p - 1) sent.push_back(me.start(me.to(stage + 1, data, n, batch)));
          return data;
        };
        const auto backward = [&](int batch, float* data) {
          if (stage < p - 1) {
            data = me.gpu.room<float>(n);
            me.run(me.from(stage + 1, data, n, 100 + batch));
          }
          me.add_one(data, n);
          if (stage > 0) sent.push_back(me.start(me.to(stage - 1, data, n, 100 + batch)));
          Floats expected = values(batch, n);  // plus 1 from each stage down, and up to here
          for (float& value : expected) value += static_cast<float>(2 * p - stage);
          CHECK(me.gpu.get(data, n) == expected);
        };
        std::vector<float*> activations;
        const int warm_up = std::min(p - 1 - stage, kMicroBatches);
        for (int i = 0; i < warm_up; ++i) activations.push_back(forward(i));
        for (int i = 0; i < kMicroBatches; ++i) {
          if (warm_up + i < kMicroBatches) activations.push_back(forward(warm_up + i));
          backward(i, activations[static_cast<std::size_t>(i)]);
        }
        for (const auto& work : sent) me.wait(work);
        me.group.run(me.gpu.sum(total, n), no_check);
      });
    }
  });
}

TEST(double_messages_and_collectives_in_opposite_orders_are_launched_in_one) {
  under_every_schedule([] {
    run_mailers({0, 0, 0}, [](const Mailer& me) {
      const int rank = me.group.rank();
      for (int round = 0; round < 10; ++round) {
        float* const bucket = me.gpu.put(values(rank, 30));
        float* const arriving = me.gpu.room<float>(10);
        std::shared_ptr<pycomm::Work> sum;
        Works works;
        const bool swapped = (rank + round) % 2 != 0;
        if (swapped) sum = me.group.start(me.gpu.sum(bucket, 30));
        works.push_back(me.start(me.to((rank + 1) % 3, me.gpu.put(values(rank, 10)), 10)));
        works.push_back(me.start(me.from((rank + 2) % 3, arriving, 10)));
        if (!swapped) sum = me.group.start(me.gpu.sum(bucket, 30));
        for (const auto& work : works) me.wait(work);
        sum->wait(no_check);
        sum->device_call()->order_before(reinterpret_cast<pycomm::StreamAddress>(me.gpu.stream()));
        CHECK(me.gpu.get(bucket, 30) == sums(3, 30));
        CHECK(me.gpu.get(arriving, 10) == values((rank + 2) % 3, 10));
      }
    });
  });
}

TEST(double_the_earliest_message_of_any_rank_is_named) {
  run_mailers({0, 0, 1}, [](const Mailer& me) {
    if (me.group.rank() != 1) {
      me.run(me.to(1, me.gpu.put(values(me.group.rank(), 8)), 8, 4));
      return;
    }
    bool seen[3] = {};
    for (int i = 0; i < 2; ++i) {
      float* const data = me.gpu.room<float>(8);
      const int source = me.run(me.from(Transfer::kAnySource, data, 8, 4));
      CHECK(me.gpu.get(data, 8) == values(source, 8));
      seen[source] = true;
    }
    CHECK(seen[0] && seen[2]);
  });
}

TEST(double_messages_on_hosts_and_gpus_share_a_pair_of_ranks) {
  for (const auto& hosts : kPlacements) {
    run_mailers(hosts, [](const Mailer& me) {
      if (me.group.rank() > 1) return;
      const int peer = 1 - me.group.rank();
      Works works;
      float* const arriving = me.gpu.room<float>(10);
      float host = static_cast<float>(me.group.rank());
      float from_peer = -1;
      works.push_back(me.start(me.to(peer, me.gpu.put(values(me.group.rank(), 10)), 10)));
      works.push_back(me.start(me.from(peer, arriving, 10)));
      const auto office = [&](const Transfer& transfer) {
        me.group.post_office().run(transfer, 0, no_check);
      };
      office(transfer(Transfer::Direction::kSend, &host, 1, peer, 9));
      office(transfer(Transfer::Direction::kReceive, &from_peer, 1, peer, 9));
      CHECK_EQUAL(from_peer, static_cast<float>(peer));
      for (const auto& work : works) me.wait(work);
      CHECK(me.gpu.get(arriving, 10) == values(peer, 10));
    });
  }
}

// What goes wrong.

TEST(double_a_message_that_its_receive_does_not_fit_is_a_mismatch_at_both_ends) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() > 2) continue;
    const auto errors = run_mailers_catching(hosts, [](const Mailer& me) {
      float* const data = me.gpu.put(Floats(8));
      if (me.group.rank() == 0) me.run(me.to(1, data, 8, 3));
      if (me.group.rank() == 1) me.run(me.from(0, data, 7, 3));
    });
    check_all(errors,
              "Rank 0 sent 8 float32, on a GPU with tag 3, rank 1 receives 7 float32, on a");
  }
}

TEST(double_a_gpu_at_one_end_and_a_host_at_the_other_is_an_error_at_both) {
  for (const auto& hosts : kPlacements) {
    if (hosts.size() > 2) continue;
    for (const int on_gpu : {0, 1}) {
      const auto errors = run_mailers_catching(hosts, [on_gpu](const Mailer& me) {
        constexpr std::size_t n = 1000;  // a smaller one would leave its host and be forgotten
        float* const data = me.gpu.put(Floats(n));
        Floats host(n);
        Transfer made = me.group.rank() == 0 ? me.to(1, data, n) : me.from(0, data, n);
        if (me.group.rank() != on_gpu) {
          made.device = -1;
          made.memory = reinterpret_cast<std::byte*>(host.data());
        }
        me.run(made);
      });
      check_all(errors, "A message has its tensors on GPUs at both ends, or at none");
    }
  }
}

TEST(double_a_message_that_nobody_receives_is_a_timeout) {
  const auto errors = run_mailers_catching(
      {0, 0},
      [](const Mailer& me) {
        if (me.group.rank() == 0) me.run(me.to(1, me.gpu.put(Floats{1}), 1, 5));
        me.look_for_notices();
      },
      /*timeout_s=*/0.3);
  check_all(errors, "send of 1 float32, on a GPU, to rank 1, tag 5, on rank 0: timeout after 0.");
  check_all(errors, "waiting for rank 1 to receive it");
}

TEST(double_a_gpu_that_never_comes_to_a_message_is_a_timeout_and_leaves_nothing) {
  const auto errors = run_mailers_catching(
      {0, 1},
      [](const Mailer& me) {
        one_message(me, 3);  // connects
        float* const data = me.gpu.put(Floats{1});
        cudaStreamSynchronize(me.gpu.stream());
        if (me.group.rank() == 1) gpu_double::hold(me.gpu.stream(), true);
        me.run(me.group.rank() == 0 ? me.to(1, data, 1) : me.from(0, data, 1));
        me.look_for_notices();
      },
      /*timeout_s=*/0.5);
  check_all(errors, "and the GPU has not finished it");
  check_all(errors, "of 1 float32, on a GPU, ");
}

TEST(double_a_failure_elsewhere_aborts_messages_on_the_gpu) {
  const auto errors = run_mailers_catching({0, 0}, [](const Mailer& me) {
    one_message(me, 3);
    float* const data = me.gpu.put(Floats{1});
    cudaStreamSynchronize(me.gpu.stream());
    if (me.group.rank() == 1) gpu_double::hold(me.gpu.stream(), true);
    me.run(me.group.rank() == 0 ? me.to(1, data, 1) : me.from(0, data, 1));
    if (me.group.rank() == 1) throw std::runtime_error("an exception in the training loop");
    me.gpu.get(data, 1);  // would wait for ever
    me.group.check_notices();
  });
  check_all(errors, "an exception in the training loop");
}

TEST(double_a_failed_collective_ends_messages_too) {
  const auto errors = run_mailers_catching({0, 0}, [](const Mailer& me) {
    one_message(me, 3);
    float* const data = me.gpu.put(Floats(9));
    const auto never_sent = me.start(me.from(1 - me.group.rank(), data, 9, 77));
    auto sum = me.gpu.sum(data, me.group.rank() == 0 ? 8 : 9);
    CHECK_THROWS(me.group.run(sum, no_check), pycomm::MismatchError, "of 8 float32");
    never_sent->wait(no_check);
  });
  check_all(errors, "of 8 float32, SUM, on GPUs");
}

TEST(double_a_peer_that_nccl_loses_during_a_message_is_a_lost_peer) {
  bool is_told_as_such = false;
  const auto errors = run_mailers_catching({0, 0}, [&](const Mailer& me) {
    one_message(me, 3);
    float* const data = me.gpu.put(Floats{1});
    cudaStreamSynchronize(me.gpu.stream());
    if (me.group.rank() == 0) gpu_double::set_nccl_error(me.gpu.device(), ncclRemoteError);
    try {
      me.run(me.group.rank() == 0 ? me.to(1, data, 1) : me.from(0, data, 1));
    } catch (const pycomm::PeerLostError&) {
      if (me.group.rank() == 0) is_told_as_such = true;
      throw;
    }
    me.look_for_notices();
  });
  gpu_double::set_nccl_error(0, 0);
  CHECK(is_told_as_such);
  check_all(errors, "NCCL: a call before failed");
}

TEST(double_gpus_that_cannot_be_connected_refuse_the_message_at_both_ends_and_no_other) {
  use_the_double();
  gpu_double::set_nccl_version(1, 22803);
  check_none(run_mailers_catching({0, 0, 1}, [](const Mailer& me) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      float* const data = me.gpu.put(Floats{1});
      const std::string expected = attempt == 0 ? "the GPUs of ranks 0 and 1 cannot be connected: "
                                                  "rank 0 has NCCL"
                                                : "and rank 1 has 2.28.3";
      const int rank = me.group.rank();
      if (rank == 0) {
        CHECK_THROWS(me.run(me.to(1, data, 1)), pycomm::InvalidArgumentError, expected.c_str());
        me.run(me.to(2, data, 1));
      } else if (rank == 1) {
        CHECK_THROWS(me.run(me.from(0, data, 1)), pycomm::InvalidArgumentError, expected.c_str());
      } else {
        me.run(me.from(0, data, 1));
        CHECK_EQUAL(me.gpu.get(data, 1)[0], 1);
      }
    }
  }));
  gpu_double::set_nccl_version(1, 0);
}

TEST(double_messages_that_are_on_the_gpu_at_shutdown_arrive) {
  Floats arrived;
  run_mailers({0, 0}, [&](const Mailer& me) {
    float* const data = me.gpu.put(values(me.group.rank(), 5));
    if (me.group.rank() == 0) me.start(me.to(1, data, 5))->wait(no_check);
    if (me.group.rank() == 1) {
      me.start(me.from(0, data, 5))->wait(no_check);
      me.group.run({}, no_check);
      return;
    }
    me.group.run({}, no_check);
  });
}

// The tests above without the line that they are about: each must then fail.

TEST(double_catches_a_message_that_does_not_wait_for_its_stream) {
  std::string failure;
  under_every_schedule([&] {
    gpu_double::forget("cudaStreamWaitEvent", highest_priority());
    failure +=
        failure_of([] { run_mailers({0, 0}, [](const Mailer& me) { one_message(me, 50); }); });
    gpu_double::forget("");
  });
  CHECK(failure.find("values(0, count)") != std::string::npos);
}

TEST(double_catches_a_stream_that_does_not_wait_for_its_message) {
  std::string failure;
  under_every_schedule([&] {
    gpu_double::forget("cudaStreamWaitEvent", Gpu::kPriority);
    failure +=
        failure_of([] { run_mailers({0, 0}, [](const Mailer& me) { one_message(me, 50); }); });
    gpu_double::forget("");
  });
  CHECK(failure.find("values(0, count)") != std::string::npos);
}
