// The CUDA kernels: copy_segments() and fold() of kernels.h, which says what they compute.
//
// Restrictions, so that this file also runs thread by thread on a CPU (tests/cpp): no barrier, no
// shuffle, no shared memory, no atomics, no header of CUDA. A thread depends on no other.
//
// Floating point is IEEE 754's: nvcc is told not to contract (-fmad=false) and keeps subnormals and
// correctly rounded division by default. tests/test_cuda_machine_code.py reads that off the result.

#include <cstdint>
#include <type_traits>

#include "core/reduce_op.h"
#include "kernels/cuda/arguments.h"
#include "kernels/cuda/element.h"

namespace pycomm::cuda {
namespace {

// Each one instruction, written out because nvcc 13.0 takes assignments apart: into stores of 4
// bytes for sm_80 and sm_90, into loads of 8 for sm_100. Volatile, so that they keep their order:
// what is stored to may have been loaded from.

__device__ uint4 load_vector(const uint4* from) {
#if defined(__CUDA_ARCH__)
  uint4 vector;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return vector;
#else
  return *from;
#endif
}

__device__ void store_vector(uint4* to, uint4 vector) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(vector.x), "r"(vector.y), "r"(vector.z),
                 "r"(vector.w)
               : "memory");
#else
  *to = vector;
#endif
}

/// `count` elements as they are moved: in 16-byte vectors.
template <typename Format, std::uint32_t count>
class Group {
 public:
  using Bits = typename Format::Bits;

  /// Both addresses must be multiples of 16: a GPU faults otherwise.
  __device__ void load(const Bits* from) {
#pragma unroll
    for (std::uint32_t v = 0; v < kVectors; ++v) {
      const uint4 vector = load_vector(reinterpret_cast<const uint4*>(from) + v);
      words_[4 * v] = vector.x;
      words_[4 * v + 1] = vector.y;
      words_[4 * v + 2] = vector.z;
      words_[4 * v + 3] = vector.w;
    }
  }
  __device__ void store(Bits* to) const {
#pragma unroll
    for (std::uint32_t v = 0; v < kVectors; ++v) {
      store_vector(reinterpret_cast<uint4*>(to) + v,
                   {words_[4 * v], words_[4 * v + 1], words_[4 * v + 2], words_[4 * v + 3]});
    }
  }

  /// Little-endian: of two elements in a word the first is low, of two words the first.
  __device__ Bits get(std::uint32_t i) const {
    if constexpr (sizeof(Bits) == 2) return static_cast<Bits>(words_[i / 2] >> (i % 2 * 16));
    if constexpr (sizeof(Bits) == 4) return words_[i];
    if constexpr (sizeof(Bits) == 8) return words_[2 * i] | Bits{words_[2 * i + 1]} << 32;
  }
  /// Elements are set in ascending order.
  __device__ void set(std::uint32_t i, Bits bits) {
    if constexpr (sizeof(Bits) == 2) {
      words_[i / 2] = i % 2 == 0 ? bits : words_[i / 2] | std::uint32_t{bits} << 16;
    }
    if constexpr (sizeof(Bits) == 4) words_[i] = bits;
    if constexpr (sizeof(Bits) == 8) {
      words_[2 * i] = static_cast<std::uint32_t>(bits);
      words_[2 * i + 1] = static_cast<std::uint32_t>(bits >> 32);
    }
  }

 private:
  static constexpr std::uint32_t kVectors = count * sizeof(Bits) / kVectorBytes;
  std::uint32_t words_[4 * kVectors];
};

/// The elements of a run that one thread of tile `tile` takes (arguments.h has the picture).
template <typename From, typename To, std::uint32_t groups_per_thread>
class Share {
 public:
  static constexpr std::uint32_t kGroup =
      group_elements(sizeof(typename From::Bits), sizeof(typename To::Bits));

  __device__ Share(std::uint64_t count, std::uint8_t head, std::uint32_t tile)
      : head_(head),
        groups_(head == kNoVectors ? 0 : (count - head) / kGroup),
        first_group_(std::uint64_t{tile} * kTileGroups + threadIdx.x),
        first_single_(std::uint64_t{tile} * kTile + threadIdx.x) {
    const std::uint64_t singles = count - groups_ * kGroup;
    const std::uint64_t tile_end = (std::uint64_t{tile} + 1) * kTile;
    end_of_singles_ = singles < tile_end ? singles : tile_end;
  }

  /// Whether there is a g-th group for this thread; g < groups_per_thread.
  __device__ bool has_group(std::uint32_t g) const { return first_group_ + g * kThreads < groups_; }
  /// Its first element.
  __device__ std::uint64_t group(std::uint32_t g) const {
    return head_ + (first_group_ + g * kThreads) * kGroup;
  }

  template <typename Body>
  __device__ void for_each_single(Body body) const {
#pragma unroll 1
    for (std::uint64_t s = first_single_; s < end_of_singles_; s += kThreads) {
      body(s < head_ ? s : s + groups_ * kGroup);
    }
  }

 private:
  static constexpr std::uint32_t kTileGroups = kThreads * groups_per_thread;
  static constexpr std::uint32_t kTile = kTileGroups * kGroup;

  std::uint64_t head_;
  std::uint64_t groups_;
  std::uint64_t first_group_;
  std::uint64_t first_single_;
  std::uint64_t end_of_singles_;
};

// --- copy ----------------------------------------------------------------------------------------

/// The segment that a tile belongs to: the last whose first tile is not behind it.
__device__ std::uint32_t segment_of(const CopyArguments& arguments, std::uint32_t tile) {
  std::uint32_t low = 0;
  std::uint32_t high = arguments.segment_count;
  while (high - low > 1) {
    const std::uint32_t middle = (low + high) / 2;
    if (arguments.first_tile[middle] <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// What becomes of an element, by CopyArguments::verbatim.
template <typename Format>
struct Verbatim {
  using From = Format;
  using To = Format;

  __device__ explicit Verbatim(const CopyArguments&) {}
  __device__ typename To::Bits operator()(typename From::Bits bits) const { return bits; }
};

template <typename Source, typename Destination>
struct Scaled {
  using From = Source;
  using To = Destination;
  typename From::Accumulator scale;

  __device__ explicit Scaled(const CopyArguments& arguments)
      : scale(static_cast<typename From::Accumulator>(
            arguments.device_scale != nullptr ? *arguments.device_scale : arguments.scale)) {}
  __device__ typename To::Bits operator()(typename From::Bits bits) const {
    return To::narrow(From::widen(bits) * scale);
  }
};

template <typename Conversion>
__device__ void copy_tile(const CopyArguments& arguments) {
  using From = typename Conversion::From;
  using To = typename Conversion::To;
  constexpr std::uint32_t kGroups =
      copy_groups(sizeof(typename From::Bits), sizeof(typename To::Bits));
  using Share = cuda::Share<From, To, kGroups>;

  const std::uint32_t segment = segment_of(arguments, blockIdx.x);
  const Share share(arguments.count[segment], arguments.head[segment],
                    blockIdx.x - arguments.first_tile[segment]);
  const auto* from = static_cast<const typename From::Bits*>(arguments.from[segment]);
  auto* to = static_cast<typename To::Bits*>(arguments.to[segment]);
  const Conversion converted(arguments);
  bool finite = true;

  // All loads before the first store, which the compiler must take for a change of what is loaded.
  Group<From, Share::kGroup> loaded[kGroups];
#pragma unroll
  for (std::uint32_t g = 0; g < kGroups; ++g) {
    if (share.has_group(g)) loaded[g].load(from + share.group(g));
  }
#pragma unroll
  for (std::uint32_t g = 0; g < kGroups; ++g) {
    if (!share.has_group(g)) break;
    Group<To, Share::kGroup> stored;
#pragma unroll
    for (std::uint32_t i = 0; i < Share::kGroup; ++i) {
      const auto bits = converted(loaded[g].get(i));
      finite = finite && is_finite<To>(bits);
      stored.set(i, bits);
    }
    stored.store(to + share.group(g));
  }

  share.for_each_single([&](std::uint64_t i) {
    const auto bits = converted(from[i]);
    finite = finite && is_finite<To>(bits);
    to[i] = bits;
  });

  // Whoever comes here stores the same, so it does not matter who comes last.
  if (!finite && arguments.found_nonfinite != nullptr) *arguments.found_nonfinite = 1;
}

template <typename From, typename To>
__device__ void copy_tile(const CopyArguments& arguments) {
  if constexpr (std::is_same_v<From, To>) {
    if (arguments.verbatim) return copy_tile<Verbatim<From>>(arguments);
  }
  copy_tile<Scaled<From, To>>(arguments);
}

// --- fold ----------------------------------------------------------------------------------------

// Two of the accumulator's type, the second from the later source. MIN and MAX as fold.h says: a
// NaN in `b` fails the comparison and is chosen by it, a NaN in `a` is put back.

struct Sum {
  template <typename T>
  static __device__ T combine(T a, T b) {
    return a + b;
  }
};
struct Product {
  template <typename T>
  static __device__ T combine(T a, T b) {
    return a * b;
  }
};
struct Minimum {
  template <typename T>
  static __device__ T combine(T a, T b) {
    const T smaller = a < b ? a : b;
    return a == a ? smaller : a;
  }
};
struct Maximum {
  template <typename T>
  static __device__ T combine(T a, T b) {
    const T larger = a > b ? a : b;
    return a == a ? larger : a;
  }
};

/// The quotient is rounded correctly, so a divisor that the host applies as its exact reciprocal
/// (a power of two) gives the same bits here.
template <typename To, typename T>
__device__ typename To::Bits finished(T folded, T divisor, T postscale) {
  if (divisor != 1) folded = folded / divisor;
  return To::narrow(folded * postscale);
}

template <typename From, typename To, typename Op>
__device__ void fold_tile(const FoldArguments& arguments) {
  using T = typename From::Accumulator;
  using Share = cuda::Share<From, To, kFoldGroups>;

  const Share share(arguments.count, arguments.head, blockIdx.x);
  const auto source = [&](std::uint32_t s) {
    return static_cast<const typename From::Bits*>(arguments.sources[s]);
  };
  auto* destination = static_cast<typename To::Bits*>(arguments.destination);
  const T prescale = static_cast<T>(arguments.prescale);
  const T divisor = static_cast<T>(arguments.divisor);
  const T postscale = static_cast<T>(arguments.postscale);
  const auto widened = [&](typename From::Bits bits) { return From::widen(bits) * prescale; };

  if (share.has_group(0)) {
    const std::uint64_t first = share.group(0);
    Group<From, Share::kGroup> next;
    T folded[Share::kGroup];
    next.load(source(0) + first);
#pragma unroll
    for (std::uint32_t i = 0; i < Share::kGroup; ++i) folded[i] = widened(next.get(i));
#pragma unroll 4
    for (std::uint32_t s = 1; s < arguments.source_count; ++s) {
      next.load(source(s) + first);
#pragma unroll
      for (std::uint32_t i = 0; i < Share::kGroup; ++i) {
        folded[i] = Op::combine(folded[i], widened(next.get(i)));
      }
    }
    Group<To, Share::kGroup> stored;
#pragma unroll
    for (std::uint32_t i = 0; i < Share::kGroup; ++i) {
      stored.set(i, finished<To>(folded[i], divisor, postscale));
    }
    stored.store(destination + first);
  }

  share.for_each_single([&](std::uint64_t i) {
    T folded = widened(source(0)[i]);
#pragma unroll 1
    for (std::uint32_t s = 1; s < arguments.source_count; ++s) {
      folded = Op::combine(folded, widened(source(s)[i]));
    }
    destination[i] = finished<To>(folded, divisor, postscale);
  });
}

/// A loop for each op, so that none decides anything within.
template <typename From, typename To>
__device__ void fold_tile(const FoldArguments& arguments) {
  switch (arguments.op) {
    case ReduceOp::kMin:
      return fold_tile<From, To, Minimum>(arguments);
    case ReduceOp::kMax:
      return fold_tile<From, To, Maximum>(arguments);
    case ReduceOp::kProd:
      return fold_tile<From, To, Product>(arguments);
    default:  // kSum and kAvg; launch.cpp refuses the others
      return fold_tile<From, To, Sum>(arguments);
  }
}

}  // namespace
}  // namespace pycomm::cuda

// The second number of __launch_bounds__ is how many blocks shall fit a multiprocessor at once: it
// bounds the registers, at 40 and 64.
#define PYCOMM_CUDA_KERNELS(source, Source, destination, Destination)                    \
  extern "C" __global__ void __launch_bounds__(pycomm::cuda::kThreads, 6)                \
      pycomm_copy_##source##_to_##destination(                                           \
          const pycomm::cuda::CopyArguments __grid_constant__ arguments) {               \
    pycomm::cuda::copy_tile<pycomm::cuda::Source, pycomm::cuda::Destination>(arguments); \
  }                                                                                      \
  extern "C" __global__ void __launch_bounds__(pycomm::cuda::kThreads, 4)                \
      pycomm_fold_##source##_to_##destination(                                           \
          const pycomm::cuda::FoldArguments __grid_constant__ arguments) {               \
    pycomm::cuda::fold_tile<pycomm::cuda::Source, pycomm::cuda::Destination>(arguments); \
  }
PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_KERNELS)
#undef PYCOMM_CUDA_KERNELS
