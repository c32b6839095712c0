// Reductions on GPUs in exact order, against the stand-ins for libcudart and libnccl: the bits are
// those of the host's plane. No GPU.

#include <algorithm>
#include <chrono>
#include <random>
#include <thread>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "kernels/fold.h"

using pycomm::Algorithm;
using pycomm::DType;
using pycomm::Group;
using pycomm::Kind;
using pycomm::Operation;
using pycomm::ReduceOp;

namespace {

using Bytes = std::vector<std::byte>;

const std::vector<std::vector<int>> kPlacements = {
    {0},       {0, 0},       {0, 0, 0},       {0, 0, 0, 0}, {0, 1},
    {0, 1, 2}, {0, 0, 1, 1}, {0, 0, 0, 1, 0}, {0, 1, 0, 1}, {0, 1, 1, 2, 2, 2}};

/// Of any sign and size, so that another order of adding them shows.
Bytes numbers(DType dtype, int rank, std::size_t count) {
  std::mt19937 random(static_cast<unsigned>(rank) * 7919u + static_cast<unsigned>(count));
  std::normal_distribution<double> normal;
  Bytes bytes(count * size_of(dtype));
  const auto put = [&]<typename T>(std::size_t i, T value) {
    std::memcpy(bytes.data() + i * sizeof(T), &value, sizeof(T));
  };
  for (std::size_t i = 0; i < count; ++i) {
    const double value = std::exp2(4 * normal(random)) * normal(random);
    if (dtype == DType::kFloat64) {
      put(i, value);
      continue;
    }
    const auto single = static_cast<float>(value);
    if (dtype == DType::kComplex64) {
      put(2 * i, single);
      put(2 * i + 1, static_cast<float>(normal(random)));
    } else if (dtype == DType::kFloat32) {
      put(i, single);
    } else if (dtype == DType::kInt32) {
      put(i, static_cast<std::int32_t>(1000 * value));
    } else {
      const auto* const source = reinterpret_cast<const std::byte*>(&single);
      pycomm::fold({DType::kFloat32, dtype}, bytes.data() + i * 2, {&source, 1}, 1);
    }
  }
  return bytes;
}

/// A reduction without its memory.
struct Case {
  Kind kind = Kind::kAllReduce;
  DType dtype = DType::kBFloat16;
  ReduceOp op = ReduceOp::kSum;
  std::size_t count = 1000;
  double prescale = 1;
  double postscale = 1;
  bool in_place = false;
};

Operation without_memory(const Case& test, Group& group) {
  Operation made;
  made.kind = test.kind;
  made.dtype = test.dtype;
  made.op = test.op;
  made.count = test.count;
  made.prescale = test.prescale;
  made.postscale = test.postscale;
  made.root = group.size() - 1;
  return made;
}

/// What the case comes to on the host, and on the GPU in exact order or as NCCL does it.
Bytes on_host(Group& group, const Case& test) {
  Operation operation = without_memory(test, group);
  const auto blocks =
      test.kind == Kind::kReduceScatter ? static_cast<std::size_t>(group.size()) : 1;
  const Bytes input = numbers(test.dtype, group.rank(), test.count * blocks);
  Bytes output(test.count * size_of(test.dtype));
  operation.input = input.data();
  operation.output = output.data();
  group.run(operation, no_check);
  return output;
}

Bytes on_gpu(Group& group, Gpu& gpu, const Case& test,
             Algorithm algorithm = Algorithm::kExactOrder) {
  Operation operation = without_memory(test, group);
  const auto me = static_cast<std::size_t>(group.rank());
  const auto blocks =
      test.kind == Kind::kReduceScatter ? static_cast<std::size_t>(group.size()) : 1;
  const std::size_t bytes = test.count * size_of(test.dtype);
  std::byte* const input = gpu.put(numbers(test.dtype, group.rank(), test.count * blocks));
  std::byte* output = gpu.room<std::byte>(bytes);
  if (test.in_place) output = input + (blocks > 1 ? me * bytes : 0);
  operation.algorithm = algorithm;
  operation.device = gpu.device();
  operation.stream = reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
  operation.input = input;
  operation.output = output;
  group.run(operation, no_check);
  return gpu.get(output, bytes);
}

bool has_result(const Case& test, const Group& group) {
  return test.kind != Kind::kReduce || group.rank() == group.size() - 1;
}

void check_bits(Group& group, Gpu& gpu, const Case& test) {
  const Bytes here = on_host(group, test);
  const Bytes there = on_gpu(group, gpu, test);
  if (has_result(test, group)) CHECK(there == here);
}

void run_in_scratch(std::size_t scratch_bytes, const std::vector<int>& hosts,
                    const std::function<void(Group&, Gpu&)>& body) {
  check_none(run_gpu_ranks_catching(hosts, body, 20, places_of_the_double(scratch_bytes)));
}

}  // namespace

TEST(double_exact_order_gives_the_bits_of_the_host_in_every_placement) {
  for (const auto& hosts : kPlacements) {
    run_gpu_ranks(hosts, [](Group& group, Gpu& gpu) {
      for (const Kind kind : {Kind::kAllReduce, Kind::kReduce, Kind::kReduceScatter}) {
        for (const std::size_t count : {0u, 1u, 7u, 1000u}) {
          for (const bool in_place : {false, true}) {
            check_bits(group, gpu,
                       {.kind = kind, .op = ReduceOp::kAvg, .count = count, .in_place = in_place});
          }
        }
      }
    });
  }
}

TEST(double_exact_order_gives_the_bits_of_the_host_for_every_dtype_and_op) {
  for (const auto& hosts : {std::vector{0, 0, 0}, {0, 1}, {0, 0, 1}}) {
    run_gpu_ranks(hosts, [](Group& group, Gpu& gpu) {
      for (const DType dtype :
           {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
        for (const ReduceOp op :
             {ReduceOp::kSum, ReduceOp::kAvg, ReduceOp::kMin, ReduceOp::kMax, ReduceOp::kProd}) {
          check_bits(group, gpu, {.dtype = dtype, .op = op, .count = 333});
        }
        check_bits(group, gpu,
                   {.dtype = dtype, .op = ReduceOp::kAvg, .prescale = 0.3, .postscale = 1.7});
      }
      check_bits(group, gpu, {.dtype = DType::kComplex64, .op = ReduceOp::kAvg});
      check_bits(group, gpu, {.dtype = DType::kInt32});
    });
  }
}

TEST(double_exact_order_gives_the_same_bits_in_pieces) {
  for (const auto& hosts : kPlacements) {
    // A piece of 16 bytes of each block, or of some; of a length that divides nothing.
    for (const std::size_t scratch_bytes : {1200u, 5000u}) {
      run_in_scratch(scratch_bytes, hosts, [](Group& group, Gpu& gpu) {
        for (const Kind kind : {Kind::kAllReduce, Kind::kReduce, Kind::kReduceScatter}) {
          for (const bool in_place : {false, true}) {
            check_bits(group, gpu, {.kind = kind, .count = 501, .in_place = in_place});
          }
        }
      });
    }
  }
}

TEST(double_exact_order_lies_between_what_its_stream_had_before_and_gets_after) {
  under_every_schedule([] {
    for (const auto& hosts : {std::vector{0, 0, 0}, {0, 0, 1}}) {
      run_in_scratch(4096, hosts, [](Group& group, Gpu& gpu) {
        for (int i = 0; i < 3; ++i) check_bits(group, gpu, {.count = 2000});
      });
    }
  });
}

TEST(double_groups_take_turns_in_the_scratch) {
  under_every_schedule([] {
    run_in_scratch(4096, {0, 0, 0}, [](Group& group, Gpu& gpu) {
      const auto other = group.duplicate(no_check);
      std::vector<std::shared_ptr<pycomm::Work>> works;
      std::vector<std::byte*> results;
      const Case test{.count = 3000};
      for (int i = 0; i < 4; ++i) {
        Operation operation = without_memory(test, group);
        operation.algorithm = Algorithm::kExactOrder;
        operation.device = gpu.device();
        operation.stream = reinterpret_cast<pycomm::StreamAddress>(gpu.stream());
        operation.output = gpu.put(numbers(test.dtype, group.rank(), test.count));
        operation.input = operation.output;
        results.push_back(operation.output);
        works.push_back((i % 2 == 0 ? group : *other).start(operation));
      }
      const Bytes expected = on_host(group, test);
      for (std::size_t i = 0; i < works.size(); ++i) {
        works[i]->wait(no_check);
        works[i]->device_call()->order_before(
            reinterpret_cast<pycomm::StreamAddress>(gpu.stream()));
        CHECK(gpu.get(results[i], expected.size()) == expected);
      }
    });
  });
}

TEST(double_exact_order_without_nccl_is_what_the_hosts_do) {
  check_none(run_gpu_ranks_catching(
      {0, 0, 1},
      [](Group& group, Gpu& gpu) {
        for (const Kind kind : {Kind::kAllReduce, Kind::kReduce, Kind::kReduceScatter}) {
          check_bits(group, gpu, {.kind = kind, .op = ReduceOp::kAvg, .count = 3000});
        }
      },
      20, places_of_the_double(), pycomm::nccl::Transport::kStaged));
}

TEST(double_exact_order_sends_the_bytes_that_its_header_names) {
  // n bytes of an all-reduce of 16-bit floats; p ranks on H hosts.
  for (const auto& hosts : {std::vector{0, 0, 0, 0}, {0, 0, 1, 1}, {0, 1, 0, 1, 2, 2}}) {
    const std::size_t n = 9600 * 2;
    gpu_double::sent();
    run_gpu_ranks(hosts, [](Group& group, Gpu& gpu) { on_gpu(group, gpu, {.count = 9600}); });
    const std::size_t p = hosts.size();
    const std::size_t host_count = 1 + static_cast<std::size_t>(std::ranges::max(hosts));
    const std::size_t on_host = p / host_count;
    std::vector<std::size_t> inside(p);            // by rank
    std::vector<std::size_t> outside(host_count);  // by host
    for (const auto& [way, bytes] : gpu_double::sent()) {
      const auto from = static_cast<std::size_t>(way.first);
      const auto to = static_cast<std::size_t>(way.second);
      if (hosts[from] == hosts[to]) {
        inside[from] += bytes;
      } else {
        outside[static_cast<std::size_t>(hosts[from])] += bytes;
      }
    }
    for (const std::size_t bytes : inside) CHECK_EQUAL(bytes, 2 * (on_host - 1) * n / on_host);
    for (const std::size_t bytes : outside) {
      CHECK_EQUAL(bytes, (host_count - 1) * 3 * n / host_count);
    }
  }
}

TEST(double_the_least_scratch_of_the_ranks_decides_for_all) {
  const auto errors = run_gpu_ranks_catching(
      {0, 0}, [](Group& group, Gpu& gpu) { check_bits(group, gpu, {.count = 2000}); }, 20,
      places_of_the_double(8));
  check_all(errors, "8 bytes of scratch are too little for 2 ranks");
}

TEST(double_without_kernels_exact_order_is_refused_and_nccl_goes_on) {
  const auto errors = run_gpu_ranks_catching(
      {0, 0},
      [](Group& group, Gpu& gpu) {
        std::string refused;
        try {
          on_gpu(group, gpu, {});
        } catch (const pycomm::InvalidArgumentError& error) {
          refused = error.what();
        }
        CHECK(refused.find("cannot reduce in exact order: rank 0 has no kernels: the CUDA kernels "
                           "cannot be loaded") != std::string::npos);
        CHECK(refused.find("all_reduce of 1000 bfloat16") != std::string::npos);
        float* const data = gpu.put(values(group.rank(), 10));
        group.run(gpu.sum(data, 10), no_check);
        CHECK(gpu.get(data, 10) == sums(2, 10));
      },
      20, {{}, {}, "/nowhere.so"});
  check_none(errors);
}

TEST(double_exact_order_beside_what_nccl_does_is_a_mismatch) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    on_gpu(group, gpu, {}, group.rank() == 0 ? Algorithm::kExactOrder : Algorithm::kAuto);
  });
  check_all(errors, "SUM, exact_order, on GPUs");
  check_all(errors, "SUM, on GPUs");
}

TEST(double_exact_order_on_the_host_is_never_the_ring) {
  // On each of three hosts one rank, which has been told to use the ring.
  const auto differs = [](Algorithm algorithm) {
    int different = 0;
    check_none(run_ranks_catching({0, 1, 2},
                                  [&](Group& group) {
                                    Case test{.dtype = DType::kFloat32, .count = 5000};
                                    const Bytes data =
                                        numbers(test.dtype, group.rank(), test.count);
                                    Bytes result(data.size());
                                    const auto run = [&](Algorithm chosen) {
                                      Operation operation = without_memory(test, group);
                                      operation.input = data.data();
                                      operation.output = result.data();
                                      operation.algorithm = chosen;
                                      group.run(operation, no_check);
                                      return result;
                                    };
                                    const Bytes in_order = run(Algorithm::kDirect);
                                    if (run(algorithm) != in_order && group.rank() == 0)
                                      ++different;
                                  },
                                  60, {}, {}, {}, {{}, Algorithm::kRing}));
    return different;
  };
  CHECK_EQUAL(differs(Algorithm::kAuto), 1);
  CHECK_EQUAL(differs(Algorithm::kExactOrder), 0);
}

TEST(double_a_gpu_that_hangs_ends_exact_order_in_time) {
  const auto errors = run_gpu_ranks_catching(
      {0, 0, 0},
      [](Group& group, Gpu& gpu) {
        on_gpu(group, gpu, {.count = 50});  // connects
        if (group.rank() == 1) gpu_double::hold(gpu.stream(), true);
        std::byte* const data = gpu.put(numbers(DType::kBFloat16, group.rank(), 50));
        Operation operation = gpu.operation(Kind::kAllReduce, DType::kBFloat16, data, data, 50);
        operation.algorithm = Algorithm::kExactOrder;
        group.run(operation, no_check);  // over with its launch
        for (int i = 0; i < 1000; ++i) {
          group.check_notices();
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
      },
      /*timeout_s=*/0.5);
  check_all(errors, "timeout after 0.");
  check_all(errors, "all_reduce of 50 bfloat16, SUM, exact_order, on GPUs (call #3) on rank ");
}
