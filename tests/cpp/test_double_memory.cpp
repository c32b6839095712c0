// Bucket memory on GPUs against the stand-ins for libcudart and libnccl (tests/double/). No GPU.
// The double blames whoever registers memory with a call on the GPU, frees what a communicator
// knows, or ends a communicator that knows memory; run_gpu_ranks looks at that, and for leaks.

#include <dlfcn.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <utility>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"

using pycomm::DeviceMemory;
using pycomm::Group;

namespace {

std::shared_ptr<DeviceMemory> bucket_of(Group& group, const Gpu& gpu, std::size_t count) {
  return group.allocate_on_device(count * sizeof(float), gpu.device(),
                                  reinterpret_cast<pycomm::StreamAddress>(gpu.stream()), no_check);
}

float* floats_in(const DeviceMemory& memory) { return reinterpret_cast<float*>(memory.data()); }

void fill(const Gpu& gpu, const DeviceMemory& memory, const Floats& values) {
  cudaMemcpyAsync(memory.data(), values.data(), values.size() * sizeof(float),
                  cudaMemcpyHostToDevice, gpu.stream());
  cudaStreamSynchronize(gpu.stream());
}

/// A sum in such memory is right.
void sum_works(Group& group, Gpu& gpu, const DeviceMemory& bucket) {
  const std::size_t count = bucket.bytes() / sizeof(float);
  fill(gpu, bucket, values(group.rank(), count));
  group.run(gpu.sum(floats_in(bucket), count), no_check);
  CHECK(gpu.get(floats_in(bucket), count) == sums(group.size(), count));
}

/// Waits for the progress threads, which free what nobody holds.
bool comes_true(const std::function<bool()>& condition) {
  for (int i = 0; i < 1000 && !condition(); ++i) usleep(1000);
  return condition();
}

/// NCCL as it was before any of this, as long as this lives.
struct OldNccl {
  OldNccl() {
    setenv("PYCOMM_NCCL_LIBRARY", DOUBLE_NCCL_2_18, 1);
    dlopen(DOUBLE_NCCL_2_18, RTLD_NOW);  // by one thread: what the loader does, no sanitizer sees
  }
  ~OldNccl() { use_the_double(); }
};

}  // namespace

TEST(double_memory_is_zeroed_before_anything_that_its_stream_gets_later) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0, 1}, [](Group& group, Gpu& gpu) {
      const auto bucket = bucket_of(group, gpu, 1000);
      CHECK_EQUAL(bucket->bytes(), 4000u);
      CHECK_EQUAL(bucket->device(), gpu.device());
      CHECK(gpu.get(floats_in(*bucket), 1000) == Floats(1000));
      sum_works(group, gpu, *bucket);
    });
  });
}

TEST(double_memory_is_a_window_of_all_ranks) {
  run_gpu_ranks({0, 0, 1}, [](Group& group, Gpu& gpu) {
    const auto bucket = bucket_of(group, gpu, 10);
    group.run({}, no_check);  // a barrier
    CHECK_EQUAL(gpu_double::census().registrations, 3);
    sum_works(group, gpu, *bucket);
  });
}

TEST(double_memory_is_made_known_between_calls_not_during_one) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
      for (int round = 0; round < 3; ++round) {
        float* const data = gpu.put(values(group.rank(), 500));
        group.run(gpu.sum(data, 500), no_check);  // still on the GPU
        const auto bucket = bucket_of(group, gpu, 20);
        CHECK(gpu.get(data, 500) == sums(2, 500));
        sum_works(group, gpu, *bucket);
      }
    });
  });
}

TEST(double_memory_that_is_dropped_is_forgotten_and_freed_while_the_group_goes_on) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    auto bucket = bucket_of(group, gpu, 10);
    const auto kept = bucket_of(group, gpu, 10);
    // In use when it is dropped, by another thread than the one that made it.
    group.run(gpu.sum(floats_in(*bucket), 10), no_check);
    std::thread([bucket = std::move(bucket)]() mutable { bucket.reset(); }).join();
    const auto freed = [] { return gpu_double::census().registrations <= 2; };
    CHECK(comes_true(freed));
    sum_works(group, gpu, *kept);
    sum_works(group, gpu, *bucket_of(group, gpu, 30));
  });
}

TEST(double_memory_that_is_dropped_at_once_is_freed_without_another_call) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    bucket_of(group, gpu, 10).reset();
    CHECK(comes_true([] { return gpu_double::census().registrations == 0; }));
    group.run({}, no_check);  // before the next round's
  });
}

TEST(double_memory_outlives_its_group_and_shutdown) {
  std::vector<std::shared_ptr<DeviceMemory>> kept(2);
  use_the_double();
  const auto errors = run_ranks_catching({0, 0}, [&](Group& group) {
    Gpu gpu(group.rank());
    auto& bucket = kept[static_cast<std::size_t>(group.rank())];
    bucket = bucket_of(group, gpu, 10);
    sum_works(group, gpu, *bucket);
  });
  check_all(errors, "");
  CHECK_EQUAL(errors[0] + errors[1], "");
  CHECK_EQUAL(gpu_double::census().registrations, 0);
  CHECK_EQUAL(gpu_double::census().communicators, 0);
  CHECK_EQUAL(gpu_double::census().allocations, 2);
  Gpu gpu(0);
  CHECK_EQUAL(gpu.get(floats_in(*kept[0]), 1)[0], sums(2, 1)[0]);
  kept.clear();
  CHECK_EQUAL(gpu_double::census().allocations, 0);
  CHECK_EQUAL(gpu_double::errors(), "");
}

TEST(double_memory_of_different_sizes_is_known_to_each_rank_alone) {
  run_gpu_ranks({0, 0, 0}, [](Group& group, Gpu& gpu) {
    const auto bucket = bucket_of(group, gpu, 10 + static_cast<std::size_t>(group.rank()));
    group.run({}, no_check);
    CHECK_EQUAL(gpu_double::census().registrations, 3);
    fill(gpu, *bucket, values(group.rank(), 10));
    group.run(gpu.sum(floats_in(*bucket), 10), no_check);
    CHECK(gpu.get(floats_in(*bucket), 10) == sums(3, 10));
  });
}

TEST(double_memory_without_a_window_on_one_rank_has_none_on_any) {
  use_the_double();
  gpu_double::set_nccl_windows(1, false);
  run_gpu_ranks({0, 0, 0}, [](Group& group, Gpu& gpu) {
    const auto bucket = bucket_of(group, gpu, 10);
    group.run({}, no_check);
    CHECK_EQUAL(gpu_double::census().registrations, 3);  // as buffers
    sum_works(group, gpu, *bucket);
  });
  gpu_double::set_nccl_windows(1, true);
}

TEST(double_memory_needs_no_new_nccl) {
  under_every_schedule([] {
    use_the_double();
    const OldNccl old;
    const auto errors = run_ranks_catching({0, 0}, [](Group& group) {
      Gpu gpu(group.rank());
      const auto bucket = bucket_of(group, gpu, 10);
      CHECK_EQUAL(gpu_double::census().registrations, 0);
      CHECK(gpu.get(floats_in(*bucket), 10) == Floats(10));
      sum_works(group, gpu, *bucket);
    });
    CHECK_EQUAL(errors[0] + errors[1], "");
    CHECK_EQUAL(gpu_double::errors(), "");
    CHECK_EQUAL(gpu_double::census().allocations, 0);
  });
}

TEST(double_memory_of_no_bytes_is_memory) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    const auto bucket = bucket_of(group, gpu, 0);
    CHECK_EQUAL(bucket->bytes(), 0u);
    CHECK(bucket->data() != nullptr);
  });
}

TEST(double_memory_that_there_is_not_is_an_error_that_says_so) {
  const auto errors = run_gpu_ranks_catching({0}, [](Group& group, Gpu& gpu) {
    CHECK_THROWS(bucket_of(group, gpu, std::size_t{1} << 40), pycomm::CommError,
                 "GPU 0 has no 4398046511104 bytes left for buckets (ncclMemAlloc: ");
    sum_works(group, gpu, *bucket_of(group, gpu, 10));
  });
  CHECK_EQUAL(errors[0], "");
}

TEST(double_memory_that_one_rank_does_not_want_is_a_mismatch) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    if (group.rank() == 0) {
      bucket_of(group, gpu, 10);
    } else {
      float* const data = gpu.put(Floats{1});
      group.run(gpu.sum(data, 1), no_check);
    }
  });
  check_all(errors, "rank 0 made allocate_on_device");
}

TEST(double_memory_goes_with_a_group_that_was_aborted) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    const auto bucket = bucket_of(group, gpu, 10);
    sum_works(group, gpu, *bucket);
    if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
    float* const data = gpu.put(Floats{1});
    group.run(gpu.sum(data, 1), no_check);
    if (group.rank() == 1) {
      gpu_double::hold(gpu.stream(), false);
      throw std::runtime_error("an exception in the training loop");
    }
    for (int i = 0; i < 1000; ++i) {
      group.check_notices();
      usleep(10000);
    }
  });
  check_all(errors, "an exception in the training loop");
}

// The tests above without the line that they are about: each must then fail.

TEST(double_catches_memory_that_is_never_deregistered) {
  use_the_double();
  for (const char* const function : {"ncclCommWindowDeregister", "ncclCommDeregister"}) {
    const bool windows = std::string(function) == "ncclCommWindowDeregister";
    gpu_double::set_nccl_windows(0, windows);
    gpu_double::forget(function);
    const std::string failure = failure_of([] {
      run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
        sum_works(group, gpu, *bucket_of(group, gpu, 10));
      });
    });
    gpu_double::forget("");
    CHECK(failure.find("memory was freed that a communicator knows") != std::string::npos);
    CHECK(failure.find("a communicator that knows memory was destroyed") != std::string::npos);
    CHECK_EQUAL(gpu_double::census().registrations, 2);
    gpu_double::forgive();
  }
  gpu_double::set_nccl_windows(0, true);
}

TEST(double_catches_memory_that_is_not_zeroed) {
  gpu_double::forget("cudaMemsetAsync");
  const std::string failure = failure_of([] {
    run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
      const auto bucket = bucket_of(group, gpu, 10);
      CHECK(gpu.get(floats_in(*bucket), 10) == Floats(10));
    });
  });
  gpu_double::forget("");
  CHECK(failure.find("Floats(10)") != std::string::npos);
}
