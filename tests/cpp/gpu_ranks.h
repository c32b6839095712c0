#pragma once

#include <cuda_runtime_api.h>
#include <sys/types.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "double/gpu.h"
#include "ranks.h"

/// The tables of csrc/nccl/ load the stand-ins for libcudart and libnccl in this program.
inline void use_the_double() {
  setenv("PYCOMM_CUDART_LIBRARY", DOUBLE_CUDART, 1);
  setenv("PYCOMM_NCCL_LIBRARY", DOUBLE_NCCL, 1);
}

/// @param scratch_bytes  little, as the double's GPUs have little memory.
inline pycomm::nccl::Places places_of_the_double(std::size_t scratch_bytes = 1 << 20) {
  return {{}, {}, DOUBLE_IMAGE, scratch_bytes};
}

/// A rank's GPU (of the double) as its training loop has it: a stream, and memory on it.
class Gpu {
 public:
  explicit Gpu(int device) : device_(device) {
    cudaSetDevice(device);
    cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, kPriority);
  }
  ~Gpu() {
    gpu_double::hold(stream_, false);
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
    for (void* const address : memory_) cudaFree(address);
  }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  static constexpr int kPriority = 0;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

  /// Device memory into which the stream will have copied the values.
  template <typename T>
  T* put(const std::vector<T>& values) {
    return put(values, stream_);
  }
  /// The same for another stream, which is over before the GPU's.
  template <typename T>
  T* put(const std::vector<T>& values, cudaStream_t stream) {
    T* const address = room<T>(values.size());
    const auto* const from = reinterpret_cast<const std::byte*>(values.data());
    const auto& kept = sources_.emplace_back(from, from + values.size() * sizeof(T));
    cudaMemcpyAsync(address, kept.data(), kept.size(), cudaMemcpyHostToDevice, stream);
    return address;
  }
  template <typename T>
  T* room(std::size_t count) {
    void* address = nullptr;
    cudaMalloc(&address, count * sizeof(T));
    memory_.push_back(address);
    return static_cast<T*>(address);
  }
  /// What the stream finds there when it comes to it.
  template <typename T>
  std::vector<T> get(const T* address, std::size_t count) {
    std::vector<T> values(count);
    cudaMemcpyAsync(values.data(), address, count * sizeof(T), cudaMemcpyDeviceToHost, stream_);
    cudaStreamSynchronize(stream_);
    return values;
  }

  /// A collective on this GPU, ordered with the stream.
  pycomm::Operation operation(pycomm::Kind kind, pycomm::DType dtype, const void* input,
                              void* output, std::size_t count) const {
    pycomm::Operation made;
    made.kind = kind;
    made.dtype = dtype;
    made.input = static_cast<const std::byte*>(input);
    made.output = static_cast<std::byte*>(output);
    made.count = count;
    made.device = device_;
    made.stream = reinterpret_cast<pycomm::StreamAddress>(stream_);
    return made;
  }
  pycomm::Operation sum(float* in_place, std::size_t count) const {
    return operation(pycomm::Kind::kAllReduce, pycomm::DType::kFloat32, in_place, in_place, count);
  }

 private:
  const int device_;
  cudaStream_t stream_ = nullptr;
  std::vector<void*> memory_;
  std::list<std::vector<std::byte>> sources_;
};

/// Runs `body(group, gpu)` on every rank, each with a GPU; returns what each threw. Nothing may be
/// left of them but what the channels given might still write on a rank that failed, and the double
/// must have had nothing to blame.
inline std::vector<std::string> run_gpu_ranks_catching(
    const std::vector<int>& hosts, const std::function<void(pycomm::Group&, Gpu&)>& body,
    const pycomm::Process::Options& options,
    std::vector<std::shared_ptr<pycomm::Channel>> channels = {}) {
  use_the_double();
  const bool channels_write = !channels.empty();
  const auto errors = run_ranks_catching(
      hosts,
      [&](pycomm::Group& group) {
        Gpu gpu(group.rank());
        body(group, gpu);
      },
      options, std::move(channels));
  CHECK_EQUAL(gpu_double::errors(), "");
  const auto left = gpu_double::census();
  CHECK_EQUAL(left.communicators, 0);
  CHECK_EQUAL(left.registrations, 0);
  CHECK_EQUAL(left.events, 0);
  CHECK_EQUAL(left.streams, 0);
  CHECK_EQUAL(left.pinned, 0);
  const auto succeeded = std::count(errors.begin(), errors.end(), "");
  const auto failed = static_cast<int>(errors.size()) - static_cast<int>(succeeded);
  CHECK(left.allocations <= (channels_write ? failed : 0));
  if (left.allocations > 0) gpu_double::forgive();
  return errors;
}

inline std::vector<std::string> run_gpu_ranks_catching(
    const std::vector<int>& hosts, const std::function<void(pycomm::Group&, Gpu&)>& body,
    double timeout_s = 20, const pycomm::nccl::Places& places = places_of_the_double(),
    pycomm::nccl::Transport transport = pycomm::nccl::Transport::kNccl,
    pycomm::Staging staging = {}) {
  return run_gpu_ranks_catching(hosts, body,
                                {timeout_s, std::size_t{64} << 20, staging, {}, places, transport});
}

/// That no rank has thrown anything.
inline void check_none(const std::vector<std::string>& errors) {
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    if (!errors[rank].empty()) {
      throw check::Failure("rank " + std::to_string(rank) + ": " + errors[rank]);
    }
  }
}

inline void run_gpu_ranks(const std::vector<int>& hosts,
                          const std::function<void(pycomm::Group&, Gpu&)>& body,
                          pycomm::nccl::Transport transport = pycomm::nccl::Transport::kNccl,
                          pycomm::Staging staging = {}) {
  check_none(run_gpu_ranks_catching(hosts, body, /*timeout_s=*/20, places_of_the_double(),
                                    transport, staging));
}

/// With each kind of stream starved in turn: a wait that is missing between two streams is not
/// found by chance.
inline void under_every_schedule(const std::function<void()>& body) {
  int lowest = 0;
  int highest = 0;
  cudaDeviceGetStreamPriorityRange(&lowest, &highest);
  for (const int starved : {gpu_double::kNobody, Gpu::kPriority, highest}) {
    gpu_double::starve(starved);
    body();
  }
  gpu_double::starve(gpu_double::kNobody);
}
