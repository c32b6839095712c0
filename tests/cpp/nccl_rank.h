#pragma once

#include <memory>

#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "nccl/communicator.h"
#include "nccl/launch.h"

/// One rank of a communicator, around groups.
struct NcclRank {
  int rank;
  Gpu& gpu;
  std::shared_ptr<pycomm::nccl::Device> device;
  std::unique_ptr<pycomm::nccl::Communicator> communicator;

  void sum(const pycomm::nccl::Communicator& over, float* data, std::size_t count) const {
    pycomm::nccl::launch(over, gpu.sum(data, count), rank, 0);
    over.settle();
  }
  /// The sum of everyone's number among those that `over` connects.
  float summed(const pycomm::nccl::Communicator& over, float mine) const {
    float* const data = gpu.put(Floats{mine});
    cudaStreamSynchronize(gpu.stream());
    sum(over, data, 1);
    cudaStreamSynchronize(device->stream);
    return gpu.get(data, 1)[0];
  }
};

inline void check_nothing_is_left() {
  CHECK_EQUAL(gpu_double::errors(), "");
  CHECK_EQUAL(gpu_double::census().communicators, 0);
  CHECK_EQUAL(gpu_double::census().streams, 0);
  CHECK_EQUAL(gpu_double::census().allocations, 0);
}
