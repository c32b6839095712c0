#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "kernels/fold.h"

// What the CUDA kernels do, and how they are started. Three parts, so that none needs the others'
// tools:
//
//   kernels.cu    the kernels. nvcc makes an image of machine code of them (a fatbin), image.cpp
//                 puts it into libpycomm_cuda.so beside the core: a library of data, which calls
//                 nothing and links no CUDA. g++ compiles the same file for tests that run on a
//                 CPU.
//   arguments.h   what a kernel is handed. Its layout is the ABI between kernels.cu and launch.cpp.
//   launch.cpp    the functions below, part of the core: they check, cut the work into blocks and
//                 fill the arguments in. They know no CUDA header either and start a kernel through
//                 a Launcher, so they do the same over a GPU and over a test's stand-in for one.
//
// The loader (nccl/kernel_image.h) opens libpycomm_cuda.so, gives the image to cudaLibraryLoadData,
// asks cudaLibraryGetKernel for each of kernel_names(), and implements Launcher with
// cudaLaunchKernelExC. docs/adr/0011-the-cuda-kernels-are-an-image.md has the reasons.

namespace pycomm::cuda {

/// The dtypes that a kernel may read and write: the pairs that a fold of floats may have. The first
/// two columns name what is read, the others what is written.
#define PYCOMM_CUDA_DTYPE_PAIRS(X)          \
  X(float16, Float16, float16, Float16)     \
  X(float16, Float16, float32, Float32)     \
  X(bfloat16, BFloat16, bfloat16, BFloat16) \
  X(bfloat16, BFloat16, float32, Float32)   \
  X(float32, Float32, float16, Float16)     \
  X(float32, Float32, bfloat16, BFloat16)   \
  X(float32, Float32, float32, Float32)     \
  X(float64, Float64, float64, Float64)

/// Each pair has two kernels, kCopyFloat16ToFloat32 being pycomm_copy_float16_to_float32.
enum class Kernel : std::uint32_t {
#define PYCOMM_CUDA_KERNEL(source, Source, destination, Destination) \
  kCopy##Source##To##Destination, kFold##Source##To##Destination,
  PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_KERNEL)
#undef PYCOMM_CUDA_KERNEL
};

/// The names in the image, indexed by Kernel.
std::span<const char* const> kernel_names();

/// Threads of every block of every kernel, in one dimension. No dynamic shared memory is used.
inline constexpr std::uint32_t kThreads = 256;

/// Starts kernels on one stream of one device.
class Launcher {
 public:
  /// Queue `block_count` blocks (one dimension, at least 1) of kThreads threads, in order behind
  /// what was queued before, and do not wait. The kernel takes one parameter, by value:
  /// `arguments`, at most 4096 bytes, which is only valid during the call. That is what
  ///
  ///   void* parameters[] = {const_cast<void*>(arguments)};
  ///   cudaLaunchKernel(kernel, dim3(block_count), dim3(kThreads), parameters, 0, stream)
  ///
  /// does, so every launch can be captured in a CUDA graph as it is.
  /// @throws  what the implementation throws when a launch fails; the functions below pass it on,
  ///          and launches before it stay queued.
  virtual void launch(Kernel kernel, std::uint32_t block_count, const void* arguments) = 0;

 protected:
  ~Launcher() = default;
};

/// A run of elements to move.
struct Segment {
  const void* from;
  void* to;
  std::uint64_t count;  // elements
};

/// What copy_segments() does with each element:
///
///   to[i] = round(scale * from[i])
///
/// computed in float32 (of float64: in float64), where `scale` is rounded to that type first.
struct CopySpec {
  DType from_dtype;
  DType to_dtype;
  double scale = 1;
  /// On the device, read when the kernel runs, and replaces `scale`; null: there is none. It is
  /// for a loss scale that the host must not wait for.
  const float* device_scale = nullptr;
  /// On the device; is set to 1 if any element written is infinite or NaN, which every
  /// infinite or NaN element read leads to, and otherwise left alone. null: nobody asks.
  float* found_nonfinite = nullptr;
};

/// Copy all segments, scaling and converting. Packing gradients into a bucket, unpacking them, and
/// unscaling them where they lie are all this:
///
///   pack      from = each gradient         to = its place in the bucket
///   unpack    from = its place             to = each gradient
///   unscale   from = to = each gradient    device_scale = 1 / the loss scale, found_nonfinite
///
/// Bits are those of the host's fold of one source with `prescale = scale`: rounded once to nearest
/// even, subnormals kept, a NaN becomes the one positive quiet NaN of its type. Where there is
/// nothing to scale or convert (same dtype, scale 1, no device_scale), bits are copied: NaNs keep
/// their payload.
///
/// Pointers are device pointers, aligned to their element, nothing more. A segment whose two ends
/// can be brought to 16-byte boundaries at one element (always, where both start on one) moves in
/// 16-byte loads and stores, fewer than 16 elements at its ends excepted; any other moves element
/// by element, neighbouring threads taking neighbouring elements. `to` may be `from` exactly, if
/// the dtypes are equal; other overlap, within a segment or between two, is not allowed.
///
/// Cost: one read and one write per element. One launch for each 136 segments that are not empty;
/// none if all are. A launch has one block for each started tile of each segment, 4096 elements
/// (1024 of float64), counting only those in vectors if there are any. No device memory is needed;
/// the caller's table may be freed on return.
/// @throws InvalidArgumentError  a pair of dtypes that is not in PYCOMM_CUDA_DTYPE_PAIRS, a pointer
///         not aligned to its element or null, or ends of a segment that overlap; nothing was
///         launched.
void copy_segments(Launcher& launcher, const CopySpec& spec, std::span<const Segment> segments);

/// More sources than a fold can take in one launch, hence at all.
inline constexpr std::size_t kMaxSources = 480;

/// pycomm::fold() for floats on the device, bit for bit: `count` elements of k sources, strictly in
/// the order given, in a float32 accumulator (of float64: float64), rounded once.
///
/// `spec` is that of the host: SUM, AVG, MIN, MAX or PROD, of the dtypes above. Pointers are
/// device pointers, aligned to their element; `destination` may be any of the sources, exactly, if
/// the dtypes are equal. If all k+1 can be brought to 16-byte boundaries at one element, loads and
/// stores are of 16 bytes, fewer than 16 elements at the ends excepted.
///
/// More sources than kMaxSources are folded in parts: the first of them into the accumulator's
/// type, without divisor and factors, then that result as the first source with the next ones. A
/// fold goes from left to right, so where all have the accumulator's dtype and prescale is 1, the
/// bits are those of one fold.
///
/// Cost: k reads and one write per element, one launch (none if count is 0), no memory.
/// @throws InvalidArgumentError  no source or too many, a dtype or op not listed, a divisor below
/// 1,
///         a pointer not aligned to its element or null, or a destination that overlaps a source in
///         another way than allowed; nothing was launched.
void fold(Launcher& launcher, const FoldSpec& spec, void* destination,
          std::span<const void* const> sources, std::uint64_t count);

// The library of the image, libpycomm_cuda.so.

/// Changes with Kernel, kThreads and everything in arguments.h. An image of another number must
/// not be launched.
inline constexpr std::uint32_t kImageAbi = 1;

/// Stays as it is, whatever else changes: it is how an old library is told from a new one.
struct Image {
  std::uint32_t abi;  // kImageAbi when it was built
  const void* code;   // a fatbin, for cudaLibraryLoadData
  std::size_t code_bytes;
  const char* built_by;  // "nvcc 13.0.88 for sm_80, sm_90, sm_100, compute_100"
};

/// Names the one function that libpycomm_cuda.so exports, for dlsym.
inline constexpr const char* kImageFunction = "pycomm_cuda_image";
extern "C" using ImageFunction = const Image * ();

}  // namespace pycomm::cuda
