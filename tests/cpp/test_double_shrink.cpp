// A communicator without its lost ranks, against the stand-ins for libcudart and libnccl
// (tests/double/). No GPU.

#include <nccl.h>

#include <chrono>
#include <thread>

#include "core/error.h"
#include "nccl_rank.h"

using pycomm::nccl::Communicator;
using pycomm::nccl::Device;

namespace {

/// Runs `body` on every rank of a communicator; nothing may be left, nor blamed.
void run_connected(int size, const std::function<void(NcclRank&)>& body) {
  use_the_double();
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  std::vector<std::string> errors(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        Gpu gpu(rank);
        const auto device = std::make_shared<Device>(pycomm::nccl::Places{}, rank);
        NcclRank me{rank, gpu, device, std::make_unique<Communicator>(device, id, size, rank)};
        me.communicator->settle();
        body(me);
      } catch (const std::exception& error) {
        errors[static_cast<std::size_t>(rank)] = error.what();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const std::string& error : errors) CHECK_EQUAL(error, "");
  check_nothing_is_left();
}

}  // namespace

TEST(double_the_ranks_that_are_left_go_on_in_their_order) {
  run_connected(4, [](NcclRank& me) {
    CHECK_EQUAL(me.summed(*me.communicator, float(me.rank)), 6);
    if (me.rank == 1) return;
    const auto left = me.communicator->shrink({1}, /*has_failed=*/false);
    left->settle();
    CHECK_EQUAL(me.summed(*left, float(me.rank)), 5);
    // Rank 2 is rank 1 there: it is left out next.
    if (me.rank == 2) return;
    const auto two = left->shrink({1}, false);
    two->settle();
    CHECK_EQUAL(me.summed(*two, float(me.rank)), 3);
  });
}

TEST(double_ranks_get_out_of_a_call_that_hangs_by_leaving_others_behind) {
  run_connected(3, [](NcclRank& me) {
    if (me.rank == 2) return me.communicator->abort();  // never comes to the call
    float* const data = me.gpu.put(Floats{1});
    cudaStreamSynchronize(me.gpu.stream());
    me.sum(*me.communicator, data, 1);
    const auto left = me.communicator->shrink({2}, /*has_failed=*/true);
    left->settle();
    me.communicator->abort();
    CHECK_EQUAL(me.summed(*left, float(me.rank + 1)), 3);
  });
}

TEST(double_catches_a_hanging_call_that_is_not_dropped_first) {
  std::string failure = failure_of([] {
    run_connected(3, [](NcclRank& me) {
      if (me.rank == 2) return me.communicator->abort();
      float* const data = me.gpu.put(Floats{1});
      cudaStreamSynchronize(me.gpu.stream());
      me.sum(*me.communicator, data, 1);
      const auto left = me.communicator->shrink({2}, /*has_failed=*/false);
      left->settle();
      me.communicator->abort();
    });
  });
  CHECK(failure.find("a communicator was shrunk with a call on the GPU") != std::string::npos);
}

TEST(double_a_shrink_that_is_given_up_leaves_nothing) {
  run_connected(3, [](NcclRank& me) {
    if (me.rank != 0) return;
    const auto began = std::chrono::steady_clock::now();
    me.communicator->shrink({2}, true).reset();  // rank 1 never comes
    me.communicator.reset();                     // nor does this wait for it
    CHECK(std::chrono::steady_clock::now() - began < std::chrono::seconds(5));
  });
}

TEST(double_an_old_nccl_cannot_shrink_and_says_so) {
  use_the_double();
  setenv("PYCOMM_NCCL_LIBRARY", DOUBLE_NCCL_2_18, 1);
  const auto device = std::make_shared<Device>(pycomm::nccl::Places{}, 0);
  use_the_double();
  ncclUniqueId id;
  device->nccl->ncclGetUniqueId(&id);
  Communicator alone(device, id, 1, 0);
  alone.settle();
  CHECK_THROWS(alone.shrink({1}, false), pycomm::CommError, "has no ncclCommShrink");
}

TEST(double_a_shrink_without_lost_ranks_is_refused) {
  run_connected(1, [](NcclRank& me) {
    CHECK_THROWS(me.communicator->shrink({}, false), pycomm::InvalidArgumentError,
                 "no ranks are excluded");
  });
}

TEST(double_an_error_of_nccl_that_lasts_ends_the_shrink_with_it) {
  use_the_double();
  run_connected(2, [](NcclRank& me) {
    if (me.rank == 1) return me.communicator->abort();
    gpu_double::set_nccl_error(0, ncclRemoteError);
    CHECK_THROWS(me.communicator->shrink({1}, true), pycomm::PeerLostError,
                 "NCCL: ncclCommShrink failed");
    gpu_double::set_nccl_error(0, 0);
    me.communicator->abort();
  });
}
