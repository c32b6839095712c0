// The kernels' way to a stream, against the stand-in for libcudart: the table loads the image, and
// what it launches runs on the CPU, in the order of the stream. No GPU.

#include <limits>

#include "gpu_ranks.h"
#include "nccl/kernel_image.h"

using pycomm::DType;
using pycomm::FoldSpec;
using pycomm::ReduceOp;
using pycomm::nccl::CudaTable;
using pycomm::nccl::KernelImage;
using pycomm::nccl::Kernels;
using Floats = std::vector<float>;

namespace {

/// As a process would have them.
struct Loaded {
  const bool with_the_double = (use_the_double(), true);  // before the rest
  const CudaTable cuda = CudaTable::load({});
  const Kernels kernels{cuda, KernelImage(DOUBLE_IMAGE)};
};

}  // namespace

TEST(double_gradients_are_packed_unscaled_and_checked_in_the_order_of_the_stream) {
  const Loaded loaded;
  under_every_schedule([&] {
    Gpu gpu(0);
    Kernels::StreamLauncher launcher(loaded.kernels, gpu.stream());
    float* const first = gpu.put(Floats{1, 2, 3});
    float* const second = gpu.put(Floats(5000, 4));
    float* const bucket = gpu.room<float>(5003);
    float* const nonfinite = gpu.put(Floats{0});
    const float* const inverse_scale = gpu.put(Floats{0.5});

    const pycomm::cuda::Segment pack[] = {{first, bucket, 3}, {second, bucket + 3, 5000}};
    copy_segments(launcher, {DType::kFloat32, DType::kFloat32}, pack);
    Floats packed{1, 2, 3};
    packed.resize(5003, 4);
    CHECK(gpu.get(bucket, 5003) == packed);

    pycomm::cuda::CopySpec unscale{DType::kFloat32, DType::kFloat32};
    unscale.device_scale = inverse_scale;
    unscale.found_nonfinite = nonfinite;
    const pycomm::cuda::Segment all[] = {{bucket, bucket, 5003}};
    copy_segments(launcher, unscale, all);
    for (float& value : packed) value *= 0.5F;
    CHECK(gpu.get(bucket, 5003) == packed);
    CHECK_EQUAL(gpu.get(nonfinite, 1)[0], 0);

    float* const bad = gpu.put(Floats{1, std::numeric_limits<float>::infinity()});
    const pycomm::cuda::Segment one[] = {{bad, bad, 2}};
    copy_segments(launcher, unscale, one);
    CHECK_EQUAL(gpu.get(nonfinite, 1)[0], 1);
  });
}

TEST(double_a_fold_reads_its_sources_where_they_lie) {
  const Loaded loaded;
  Gpu gpu(0);
  Kernels::StreamLauncher launcher(loaded.kernels, gpu.stream());
  const void* const sources[] = {gpu.put(Floats(300, 1)), gpu.put(Floats(300, 2)),
                                 gpu.put(Floats(300, 6))};
  float* const mean = gpu.room<float>(300);
  fold(launcher, FoldSpec{DType::kFloat32, DType::kFloat32, ReduceOp::kAvg, 3}, mean, sources, 300);
  CHECK(gpu.get(mean, 300) == Floats(300, 3));
}

TEST(double_every_kernel_of_the_list_is_found_in_the_image) {
  const Loaded loaded;  // Kernels asks for each of them
  CHECK(loaded.cuda.loads_kernels());
}
