#pragma once

#include <unistd.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "like_host.h"

inline pycomm::Transfer transfer(pycomm::Transfer::Direction direction, float* memory,
                                 std::size_t count, int peer, int tag) {
  pycomm::Transfer made;
  made.direction = direction;
  made.memory = reinterpret_cast<std::byte*>(memory);
  made.count = count;
  made.dtype = pycomm::DType::kFloat32;
  made.peer = peer;
  made.tag = tag;
  return made;
}

/// A rank with a GPU that sends and receives.
struct Mailer {
  pycomm::Group& group;
  Gpu& gpu;

  pycomm::Transfer on_gpu(pycomm::Transfer made) const {
    made.device = gpu.device();
    made.stream = stream();
    return made;
  }
  pycomm::Transfer to(int peer, float* memory, std::size_t count, int tag = 0) const {
    return on_gpu(transfer(pycomm::Transfer::Direction::kSend, memory, count, peer, tag));
  }
  pycomm::Transfer from(int peer, float* memory, std::size_t count, int tag = 0) const {
    return on_gpu(transfer(pycomm::Transfer::Direction::kReceive, memory, count, peer, tag));
  }
  int run(const pycomm::Transfer& transfer) const {
    return group.post_office().run(transfer, 0, no_check);
  }
  std::shared_ptr<pycomm::TransferWork> start(const pycomm::Transfer& transfer) const {
    return group.post_office().start(transfer, 0);
  }
  void wait(const std::shared_ptr<pycomm::TransferWork>& work) const {
    work->wait(no_check);
    work->device_call()->order_before(stream());
  }
  /// Makes the stream of the training loop add 1 to each.
  void add_one(float* memory, std::size_t count) const {
    Floats values = gpu.get(memory, count);
    for (float& value : values) value += 1;
    cudaMemcpyAsync(memory, gpu.put(values), count * sizeof(float), cudaMemcpyDeviceToDevice,
                    gpu.stream());
  }
  void look_for_notices() const {
    for (int i = 0; i < 1000; ++i) {
      group.check_notices();
      usleep(10000);
    }
  }

 private:
  pycomm::StreamAddress stream() const {
    return reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
  }
};

/// Messages of kSmallSlots go in many pieces where there is no NCCL.
inline std::vector<std::string> run_mailers_catching(
    const std::vector<int>& hosts, const std::function<void(const Mailer&)>& body,
    double timeout_s = 20, pycomm::nccl::Transport transport = pycomm::nccl::Transport::kNccl) {
  return run_gpu_ranks_catching(
      hosts, [&](pycomm::Group& group, Gpu& gpu) { body({group, gpu}); }, timeout_s,
      places_of_the_double(), transport, kSmallSlots);
}
