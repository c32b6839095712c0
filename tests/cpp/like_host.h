#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gpu_aware_channel.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"

// Collectives on the double's GPUs without NCCL, each compared with the same one on the host.

using Bytes = std::vector<std::byte>;

/// Slots so small that a thousand elements take many pieces.
constexpr pycomm::Staging kSmallSlots{.gpu_slot_bytes = 1024};

struct OverMpi {
  double timeout_s = 20;
  pycomm::nccl::Transport transport = pycomm::nccl::Transport::kMpi;
  pycomm::nccl::MpiProblem problem = [] { return std::string(); };
  pycomm::nccl::Places places = places_of_the_double();
};

/// run_gpu_ranks_catching with an MPI that takes pointers to GPU memory.
inline std::vector<std::string> run_over_mpi_catching(
    const std::vector<int>& hosts, const std::function<void(pycomm::Group&, Gpu&)>& body,
    const OverMpi& how = {}) {
  return run_gpu_ranks_catching(hosts, body,
                                {how.timeout_s,
                                 std::size_t{64} << 20,
                                 kSmallSlots,
                                 {},
                                 how.places,
                                 how.transport,
                                 how.problem},
                                gpu_aware_channels(hosts.size()));
}

inline void run_over_mpi(const std::vector<int>& hosts,
                         const std::function<void(pycomm::Group&, Gpu&)>& body,
                         const OverMpi& how = {}) {
  check_none(run_over_mpi_catching(hosts, body, how));
}

/// The schedules of under_every_schedule. A host that waits for its GPU by looking at events does
/// not tell the double so: what it starves must not wait for long each time.
inline void under_every_quick_schedule(const std::function<void()>& body) {
  gpu_double::set_patience(std::chrono::milliseconds(1));
  under_every_schedule(body);
  gpu_double::set_patience(std::chrono::milliseconds(100));
}

/// Any bits whatever, different on each rank.
inline Bytes noise(int rank, std::size_t bytes) {
  std::mt19937 random(static_cast<unsigned>(rank) * 7919u + static_cast<unsigned>(bytes));
  Bytes made(bytes);
  for (std::byte& byte : made) byte = static_cast<std::byte>(random());
  return made;
}

/// One collective as this rank calls it, with tensors of its own.
struct Call {
  pycomm::Operation operation;
  std::size_t input_count = 0;  // elements of the tensors
  std::size_t output_count = 0;
  bool in_place = false;
};

inline Call call_of(pycomm::Group& group, pycomm::Kind kind, pycomm::DType dtype, std::size_t n) {
  const auto size = static_cast<std::size_t>(group.size());
  const bool is_root = group.rank() == group.size() - 1;
  Call call;
  call.operation.kind = kind;
  call.operation.dtype = dtype;
  call.operation.count = n;
  call.operation.root = group.size() - 1;
  call.input_count =
      kind == pycomm::Kind::kReduceScatter || kind == pycomm::Kind::kAllToAll ? n * size : n;
  call.output_count =
      kind == pycomm::Kind::kAllGather || kind == pycomm::Kind::kAllToAll ? n * size : n;
  if (kind == pycomm::Kind::kScatter) call.input_count = is_root ? n * size : 0;
  if (kind == pycomm::Kind::kGather) call.output_count = is_root ? n * size : 0;
  if (kind == pycomm::Kind::kBroadcast && !is_root) call.input_count = 0;
  if (kind == pycomm::Kind::kReduce && !is_root) call.output_count = 0;
  return call;
}

/// The output of a call on the host, and of the same on the GPU, have the same bits; the inputs are
/// what they were.
inline void check_like_host(pycomm::Group& group, Gpu& gpu, const Call& call) {
  const std::size_t element = size_of(call.operation.dtype);
  const Bytes input = noise(group.rank(), call.input_count * element);
  const auto at = [](Bytes& bytes) { return bytes.empty() ? nullptr : bytes.data(); };

  pycomm::Operation on_host = call.operation;
  Bytes host_input = input;
  Bytes expected(call.output_count * element);
  on_host.input = at(host_input);
  on_host.output = call.in_place ? at(host_input) : at(expected);
  group.run(on_host, no_check);
  if (call.in_place) expected = host_input;

  pycomm::Operation on_gpu = call.operation;
  std::byte* const data = input.empty() ? nullptr : gpu.put(input);
  std::byte* const result =
      call.in_place || expected.empty() ? data : gpu.room<std::byte>(expected.size());
  on_gpu.input = data;
  on_gpu.output = expected.empty() ? nullptr : result;
  on_gpu.device = gpu.device();
  on_gpu.stream = reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
  group.run(on_gpu, no_check);
  const bool has_bits_of_host =
      expected.empty() || gpu.get<std::byte>(result, expected.size()) == expected;
  CHECK(has_bits_of_host);
  if (!call.in_place && !input.empty()) CHECK(gpu.get<std::byte>(data, input.size()) == input);
}

/// Whether sums come out wrong if the host forgets to look at events.
inline bool needs_its_waits(
    const std::function<void(const std::function<void(pycomm::Group&, Gpu&)>&)>& run) {
  std::atomic<bool> is_wrong = false;
  under_every_schedule([&] {
    gpu_double::forget("cudaEventQuery");
    // The end of the group does not see either what is left on its streams, which is blamed.
    failure_of([&] {
      run([&](pycomm::Group& group, Gpu& gpu) {
        float* const data = gpu.put(values(group.rank(), 2000));
        group.run(gpu.sum(data, 2000), no_check);
        if (gpu.get(data, 2000) != sums(2, 2000)) is_wrong = true;
        cudaDeviceSynchronize();
      });
    });
    gpu_double::forget("");
  });
  return is_wrong;
}
