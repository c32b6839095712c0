// Gradients on GPUs, from where autograd leaves them to the reduced bucket, against the stand-ins
// for libcudart and libnccl (tests/double/). No GPU.

#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "core/error.h"
#include "gpu_checks.h"
#include "gpu_ranks.h"
#include "reducer/bucket_plan.h"
#include "reducer/gpu_buckets.h"
#include "reducer/reducer.h"

using pycomm::DType;
using pycomm::GpuBuckets;
using pycomm::Group;
using pycomm::ReduceOp;
using pycomm::Reducer;
using pycomm::StreamAddress;

namespace {

StreamAddress address(cudaStream_t stream) { return reinterpret_cast<StreamAddress>(stream); }

/// A stream of a rank's GPU beside its first.
class SideStream {
 public:
  SideStream() { cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, Gpu::kPriority); }
  ~SideStream() {
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  }
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// What a rank's training loop has: parameters "0", "1", ... of these lengths, all in buckets.
class Model {
 public:
  Model(Group& group, Gpu& gpu, std::vector<std::size_t> counts, std::size_t bucket_bytes)
      : group_(group), gpu_(gpu), counts_(std::move(counts)) {
    std::vector<pycomm::ParameterSpec> specs;
    std::vector<Reducer::Parameter> parameters;
    for (const std::size_t count : counts_) {
      parameters.push_back({std::to_string(specs.size()), {DType::kFloat32, count}});
      specs.push_back({DType::kFloat32, count});
    }
    std::vector<std::size_t> order(counts_.size());
    std::iota(order.begin(), order.end(), 0u);
    buckets = pycomm::plan_buckets(specs, order, bucket_bytes, bucket_bytes);
    store = std::make_shared<GpuBuckets>(group.shared_from_this(), buckets, counts_, gpu.device(),
                                         address(gpu.stream()), no_check);
    reducer = std::make_unique<Reducer>(group.shared_from_this(), parameters, buckets, store,
                                        /*overlap=*/true);
  }

  /// Compute a gradient on `stream`, and report it.
  void backward(std::size_t parameter, cudaStream_t stream) {
    float* const gradient =
        gpu_.put(values(group_.rank() + int(parameter), counts_[parameter]), stream);
    reducer->fill(parameter, reinterpret_cast<const std::byte*>(gradient), address(stream));
    reducer->ready(parameter, address(stream));
  }
  void backward(std::size_t parameter) { backward(parameter, gpu_.stream()); }

  void finish() {
    reducer->finish(address(gpu_.stream()));
    reducer->wait(no_check, address(gpu_.stream()));
  }

  /// What the stream finds in the bucket.
  Floats gradient(std::size_t parameter) {
    for (std::size_t b = 0; b < buckets.size(); ++b) {
      for (std::size_t slot = 0; slot < buckets[b].parameters.size(); ++slot) {
        if (buckets[b].parameters[slot] != parameter) continue;
        const auto* const floats = reinterpret_cast<const float*>(store->memory(b)->data());
        return gpu_.get(floats + buckets[b].offsets[slot], counts_[parameter]);
      }
    }
    return {};
  }
  /// What it should find there if these ranks have used it.
  Floats mean(std::size_t parameter, std::vector<int> ranks) const {
    Floats sum(counts_[parameter]);
    for (const int rank : ranks) {
      const Floats one = values(rank + int(parameter), sum.size());
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += one[i];
    }
    for (float& value : sum) value /= static_cast<float>(group_.size());
    return sum;
  }

  std::vector<pycomm::Bucket> buckets;
  std::shared_ptr<GpuBuckets> store;
  std::unique_ptr<Reducer> reducer;

 private:
  Group& group_;
  Gpu& gpu_;
  const std::vector<std::size_t> counts_;
};

constexpr std::size_t kWholeModel = 1 << 20;

/// Two passes with all parameters, the last of them computed on a stream of their own.
void train(Group& group, Gpu& gpu, std::size_t bucket_bytes) {
  Model model(group, gpu, {300, 1, 0, 5000, 7}, bucket_bytes);
  const SideStream side;
  for (int pass = 0; pass < 2; ++pass) {
    model.reducer->begin(ReduceOp::kAvg, 0, pass + 1);
    for (const std::size_t parameter : {0, 1, 2}) model.backward(parameter);
    for (const std::size_t parameter : {3, 4}) model.backward(parameter, side);
    model.finish();
    for (const std::size_t parameter : {0, 1, 2, 3, 4}) {
      CHECK(model.gradient(parameter) == model.mean(parameter, {0, 1}));
      CHECK(model.reducer->used(parameter));
    }
  }
}

}  // namespace

TEST(double_gradients_are_averaged_whatever_stream_computed_them) {
  under_every_schedule([] {
    for (const std::size_t bucket_bytes : {std::size_t{1}, std::size_t{4096}, kWholeModel}) {
      run_gpu_ranks({0, 0}, [&](Group& group, Gpu& gpu) { train(group, gpu, bucket_bytes); });
      run_gpu_ranks({0, 1}, [&](Group& group, Gpu& gpu) { train(group, gpu, bucket_bytes); });
    }
  });
}

TEST(double_gradients_of_a_bucket_are_copied_by_one_kernel) {
  const int before = gpu_double::kernel_launches();
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) { train(group, gpu, kWholeModel); });
  CHECK_EQUAL(gpu_double::kernel_launches() - before, 2 * 2);  // ranks, passes
}

TEST(double_gradients_are_copied_one_by_one_where_there_are_no_kernels) {
  const int before = gpu_double::kernel_launches();
  under_every_schedule([] {
    const auto errors =
        run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) { train(group, gpu, 4096); }, 20,
                               {{}, {}, "/nowhere.so"});
    check_all(errors, "");
    CHECK_EQUAL(errors[0] + errors[1], "");
  });
  CHECK_EQUAL(gpu_double::kernel_launches(), before);
}

TEST(double_gradients_without_a_wait_between_streams_are_seen_to_be_wrong) {
  int wrong = 0;
  const auto try_without = [&](int waiting) {
    gpu_double::forget("cudaStreamWaitEvent", waiting);
    const auto errors =
        run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) { train(group, gpu, 4096); });
    gpu_double::forget("");
    wrong += errors[0].empty() ? 0 : 1;
  };
  under_every_schedule([&] { try_without(Gpu::kPriority); });  // the training loop's streams
  CHECK(wrong > 0);
  wrong = 0;
  under_every_schedule([&] { try_without(highest_priority()); });  // NCCL's
  CHECK(wrong > 0);
}

TEST(double_gradients_of_unused_parameters_are_zeros_or_what_is_held) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0, 1, 1}, [](Group& group, Gpu& gpu) {  // a quarter is exact
      Model model(group, gpu, {10, 20, 30, 40}, 4096);
      for (int pass = 0; pass < 2; ++pass) {
        model.reducer->begin(ReduceOp::kAvg, 0, pass + 1);
        model.backward(0);
        if (group.rank() == 1) model.backward(1);
        if (group.rank() != 1) model.backward(2);
        CHECK_EQUAL(model.reducer->unfired().size(), 2u);
        model.finish();
        CHECK(model.gradient(0) == model.mean(0, {0, 1, 2, 3}));
        CHECK(model.gradient(1) == model.mean(1, {1}));
        CHECK(model.gradient(2) == model.mean(2, {0, 2, 3}));
        CHECK(model.gradient(3) == model.mean(3, {}));
        CHECK(model.reducer->used(0) && model.reducer->used(1) && model.reducer->used(2));
        CHECK(!model.reducer->used(3));
      }
    });
  });
}

TEST(double_gradients_that_lie_in_the_bucket_are_reduced_there) {
  under_every_schedule([] {
    run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
      Model model(group, gpu, {100, 50}, 4096);
      const Floats mine = values(group.rank(), 100);
      model.reducer->begin(ReduceOp::kAvg, 0, 1);
      cudaMemcpyAsync(model.store->memory(0)->data(), mine.data(), 400, cudaMemcpyHostToDevice,
                      gpu.stream());
      model.reducer->fill(0, nullptr, address(gpu.stream()));
      model.reducer->ready(0, address(gpu.stream()));
      model.backward(1);
      model.finish();
      CHECK(model.gradient(0) == model.mean(0, {0, 1}));
      CHECK(model.gradient(1) == model.mean(1, {0, 1}));
    });
  });
}

TEST(double_gradients_of_an_abandoned_pass_do_not_count) {
  run_gpu_ranks({0, 0}, [](Group& group, Gpu& gpu) {
    Model model(group, gpu, {100, 50}, 4096);
    model.reducer->begin(ReduceOp::kAvg, 0, 1);
    model.backward(1);  // then an exception ends the backward
    model.reducer->begin(ReduceOp::kAvg, 0, 1);
    model.backward(0);
    model.finish();
    CHECK(model.gradient(0) == model.mean(0, {0, 1}));
    CHECK(model.gradient(1) == Floats(50));
    CHECK(!model.reducer->used(1));
  });
}

TEST(double_gradients_dropped_while_they_are_reduced_finish_the_group) {
  const auto errors = run_gpu_ranks_catching({0, 0}, [](Group& group, Gpu& gpu) {
    auto model = std::make_unique<Model>(group, gpu, std::vector<std::size_t>{100, 50}, 1);
    model->reducer->begin(ReduceOp::kAvg, 0, 1);
    if (group.rank() == 0) {
      model->backward(0);
      model.reset();
    } else {
      group.run({}, no_check);  // another call than rank 0's
    }
    group.run({}, no_check);
  });
  CHECK(!errors[0].empty());
  CHECK(!errors[1].empty());
}
