// Messages between GPUs without NCCL, through the memory of the hosts, against the stand-in for
// libcudart (tests/double/). No GPU. That they do what messages on NCCL do is in
// test_double_messages.cpp.

#include <stdexcept>
#include <string>

#include "core/error.h"
#include "gpu_checks.h"
#include "like_host.h"
#include "mailer.h"

using pycomm::Group;
using pycomm::nccl::Transport;
using Works = std::vector<std::shared_ptr<pycomm::TransferWork>>;

namespace {

std::vector<std::string> run_staged_catching(const std::vector<int>& hosts,
                                             const std::function<void(const Mailer&)>& body,
                                             double timeout_s = 20) {
  return run_mailers_catching(hosts, body, timeout_s, Transport::kStaged);
}

void run_staged(const std::vector<int>& hosts, const std::function<void(const Mailer&)>& body) {
  check_none(run_staged_catching(hosts, body));
}

/// Every rank sends `count` floats to every one, itself among them, all at once.
void everyone_to_everyone(const Mailer& me, std::size_t count) {
  Works works;
  std::vector<float*> rooms;
  const int rank = me.group.rank();
  for (int peer = 0; peer < me.group.size(); ++peer) {
    works.push_back(me.start(me.to(peer, me.gpu.put(values(rank * 7 + peer, count)), count)));
  }
  for (int peer = me.group.size() - 1; peer >= 0; --peer) {
    rooms.push_back(me.gpu.put(Floats(count, -1)));
    works.push_back(me.start(me.from(peer, rooms.back(), count)));
  }
  for (const auto& work : works) me.wait(work);
  for (int peer = 0; peer < me.group.size(); ++peer) {
    const float* const room = rooms[static_cast<std::size_t>(me.group.size() - 1 - peer)];
    CHECK(me.gpu.get(room, count) == values(peer * 7 + rank, count));
  }
}

}  // namespace

TEST(double_staged_messages_of_any_length_go_both_ways_at_once) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0}, {0, 0}, {0, 1}, {0, 1, 0, 1}}) {
    run_staged(hosts, [](const Mailer& me) {
      // A slot holds 256.
      for (const std::size_t count : {0u, 1u, 255u, 256u, 257u, 768u, 5000u}) {
        everyone_to_everyone(me, count);
      }
    });
  }
}

TEST(double_staged_messages_lie_between_what_their_streams_had_before_and_get_after) {
  under_every_quick_schedule([] {
    for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 1}}) {
      run_staged(hosts, [](const Mailer& me) {
        for (int round = 0; round < 3; ++round) everyone_to_everyone(me, 2000);
      });
    }
  });
}

TEST(double_staged_messages_pass_on_what_messages_before_have_brought) {
  under_every_quick_schedule([] {
    run_staged({0, 0, 1}, [](const Mailer& me) {
      const int rank = me.group.rank();
      float* const data = me.gpu.put(values(rank, 1000));
      for (int round = 0; round < 3; ++round) {
        if (rank > 0) me.run(me.from(rank - 1, data, 1000));
        if (rank < 2) me.run(me.to(rank + 1, data, 1000));
      }
      CHECK(me.gpu.get(data, 1000) == values(0, 1000));
    });
  });
}

TEST(double_catches_staged_messages_that_wait_for_no_event) {
  for (const int priority : {highest_priority(), Gpu::kPriority}) {
    // What comes too early is wrong unless the threads of the ranks happen to wait for each other:
    // in one run of ten they do.
    constexpr int kMostRuns = 10;
    const std::string wrong = "values(peer * 7 + rank, count)";
    bool caught = false;
    for (int run = 0; run < kMostRuns && !caught; ++run) {
      under_every_quick_schedule([&] {
        gpu_double::forget("cudaStreamWaitEvent", priority);
        const std::string failure = failure_of(
            [] { run_staged({0, 0}, [](const Mailer& me) { everyone_to_everyone(me, 2000); }); });
        gpu_double::forget("");
        caught |= failure.find(wrong) != std::string::npos;
      });
    }
    CHECK(caught);
  }
}

TEST(double_staged_messages_leave_nothing_pinned_and_are_polled_to_their_end) {
  run_staged({0, 1}, [](const Mailer& me) {
    // The last call of the job: what the other rank waits for is on its way when this one leaves.
    float* const data = me.gpu.put(values(0, 5000));
    if (me.group.rank() == 0) me.run(me.to(1, data, 5000));
    if (me.group.rank() == 1) me.run(me.from(0, data, 5000));
  });
}

TEST(double_staged_messages_end_in_time_where_a_gpu_hangs) {
  for (const auto& hosts : std::vector<std::vector<int>>{{0, 0}, {0, 1}}) {
    const auto errors = run_staged_catching(
        hosts,
        [](const Mailer& me) {
          if (me.group.rank() == 0) gpu_double::hold(me.gpu.stream(), true);
          float* const data = me.gpu.put(values(0, 5000));
          if (me.group.rank() == 0) me.run(me.to(1, data, 5000));
          if (me.group.rank() == 1) me.run(me.from(0, data, 5000));
        },
        /*timeout_s=*/0.5);
    check_all(errors, "timeout after 0.");
    check_all(errors, " of 5000 float32");
  }
}

TEST(double_staged_messages_end_where_another_rank_fails) {
  const auto errors = run_staged_catching({0, 0, 0}, [](const Mailer& me) {
    const int rank = me.group.rank();
    float* const data = me.gpu.put(Floats(5000));
    if (rank == 0) gpu_double::hold(me.gpu.stream(), true);  // between the pieces of the message
    if (rank == 0) me.run(me.to(1, me.gpu.put(Floats(5000)), 5000));
    if (rank == 1) me.run(me.from(0, data, 5000));
    usleep(100000);
    throw std::runtime_error("an exception in the training loop");
  });
  check_all(errors, "an exception in the training loop");
}

TEST(double_auto_stages_messages_if_one_rank_has_no_nccl) {
  use_the_double();
  for (const int lacking : {0, 1}) {
    gpu_double::set_nccl_version(lacking, 21703);  // too old
    check_none(run_mailers_catching(
        {0, 0, 1},
        [](const Mailer& me) {
          for (int round = 0; round < 2; ++round) everyone_to_everyone(me, 600);
          me.group.run({}, no_check);
          // The two that have one, and each of them with itself.
          CHECK(gpu_double::census().communicators > 0);
          me.group.run({}, no_check);
        },
        20, Transport::kAuto));
    gpu_double::set_nccl_version(lacking, 0);
  }
}

TEST(double_messages_never_take_nccl_beside_mpi) {
  run_over_mpi({0, 1}, [](Group& group, Gpu& gpu) {
    everyone_to_everyone({group, gpu}, 600);
    CHECK_EQUAL(gpu_double::census().communicators, 0);
  });
}
