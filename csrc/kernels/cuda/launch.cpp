#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "kernels/cuda/arguments.h"
#include "kernels/cuda/kernels.h"

namespace pycomm::cuda {
namespace {

/// The kernels of a pair of dtypes.
struct Pair {
  DType from;
  DType to;
  Kernel copy;
  Kernel fold;
};

constexpr Pair kPairs[] = {
#define PYCOMM_CUDA_PAIR(source, Source, destination, Destination)                  \
  {DType::k##Source, DType::k##Destination, Kernel::kCopy##Source##To##Destination, \
   Kernel::kFold##Source##To##Destination},
    PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_PAIR)
#undef PYCOMM_CUDA_PAIR
};

[[noreturn]] void refuse(const std::string& call, const std::string& why) {
  throw InvalidArgumentError(call + ": " + why);
}

const Pair& pair_of(DType from, DType to, const std::string& call) {
  for (const Pair& pair : kPairs) {
    if (pair.from == from && pair.to == to) return pair;
  }
  refuse(call,
         "the CUDA kernels keep float16, bfloat16, float32 or float64, or convert between float32 "
         "and a 16-bit float. Convert to one of those pairs first.");
}

/// A run of elements in device memory.
struct Run {
  const void* start;
  std::size_t element_bytes;
  std::uint64_t count;

  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(start); }
  bool overlaps(const Run& other) const {
    return address() < other.address() + other.count * other.element_bytes &&
           other.address() < address() + count * element_bytes;
  }
  /// Elements before the first that starts on a 16-byte boundary.
  std::uint32_t head() const {
    return static_cast<std::uint32_t>(-address() % kVectorBytes / element_bytes);
  }
  bool on_boundary(std::uint32_t element) const {
    return (address() + element * element_bytes) % kVectorBytes == 0;
  }
};

void check_pointer(const Run& run, const char* name, const std::string& call) {
  if (run.start == nullptr) refuse(call, std::string(name) + " is null.");
  if (run.address() % run.element_bytes == 0) return;
  refuse(call, std::string(name) + " is " + std::to_string(run.address() % run.element_bytes) +
                   " bytes behind a multiple of its element's " +
                   std::to_string(run.element_bytes) +
                   " bytes, where a GPU cannot read. Pass an aligned copy.");
}

void check_overlap(const Run& from, const Run& to, const char* from_name, const char* to_name,
                   const std::string& call) {
  const bool in_place = from.start == to.start && from.element_bytes == to.element_bytes;
  if (in_place || !from.overlaps(to)) return;
  refuse(call, std::string(to_name) + " overlaps " + from_name +
                   ". It may be the same memory exactly, if the dtypes are equal, or apart.");
}

/// How threads are to cut a run of which `from` and `to` are two ends, as arguments.h draws it.
struct Cut {
  std::uint8_t head;
  std::uint64_t tiles;
};

/// `aligned(head)`: whether every pointer of the run is on a 16-byte boundary there.
template <typename Aligned>
Cut cut(const Run& from, const Run& to, std::uint32_t groups_per_thread, Aligned aligned) {
  const std::uint64_t group = group_elements(from.element_bytes, to.element_bytes);
  const std::uint64_t tile_groups = std::uint64_t{kThreads} * groups_per_thread;
  // The boundaries of the narrower type are the rarer ones: 16 bytes hold more of its elements.
  const std::uint32_t head = (from.element_bytes < to.element_bytes ? from : to).head();
  const bool vectors = to.count >= head + group && aligned(head);
  const std::uint64_t groups = vectors ? (to.count - head) / group : 0;
  const std::uint64_t singles = to.count - groups * group;
  const auto tiles_of = [](std::uint64_t n, std::uint64_t tile) { return (n + tile - 1) / tile; };
  return {vectors ? static_cast<std::uint8_t>(head) : kNoVectors,
          std::max(tiles_of(groups, tile_groups), tiles_of(singles, tile_groups * group))};
}

/// The grid's first dimension.
constexpr std::uint64_t kMaxBlocks = 0x7fffffff;

void check_blocks(std::uint64_t tiles, const std::string& call) {
  if (tiles <= kMaxBlocks) return;
  refuse(call, std::to_string(tiles) + " tiles are more than one launch takes. Pass less at once.");
}

/// Rounded to the type that elements of `dtype` are computed in.
double accumulated(DType dtype, double value) {
  return dtype == DType::kFloat64 ? value : static_cast<float>(value);
}
double accumulated(DType dtype, std::int64_t value) {
  return dtype == DType::kFloat64 ? static_cast<double>(value) : static_cast<float>(value);
}

/// Collects segments until they fill a launch.
class CopyBatch {
 public:
  CopyBatch(Launcher& launcher, Kernel kernel, const CopySpec& spec)
      : launcher_(launcher), kernel_(kernel) {
    arguments_.scale = accumulated(spec.from_dtype, spec.scale);
    arguments_.device_scale = spec.device_scale;
    arguments_.found_nonfinite = spec.found_nonfinite;
    arguments_.verbatim =
        spec.from_dtype == spec.to_dtype && spec.scale == 1 && spec.device_scale == nullptr;
  }

  void add(const Segment& segment, const Cut& cut) {
    if (arguments_.segment_count == kMaxSegments || tiles_ + cut.tiles > kMaxBlocks) launch();
    const std::uint32_t s = arguments_.segment_count++;
    arguments_.from[s] = segment.from;
    arguments_.to[s] = segment.to;
    arguments_.count[s] = segment.count;
    arguments_.first_tile[s] = static_cast<std::uint32_t>(tiles_);
    arguments_.head[s] = cut.head;
    tiles_ += cut.tiles;
  }

  void launch() {
    if (arguments_.segment_count == 0) return;
    launcher_.launch(kernel_, static_cast<std::uint32_t>(tiles_), &arguments_);
    arguments_.segment_count = 0;
    tiles_ = 0;
  }

 private:
  Launcher& launcher_;
  Kernel kernel_;
  CopyArguments arguments_{};
  std::uint64_t tiles_ = 0;
};

}  // namespace

std::span<const char* const> kernel_names() {
  static constexpr const char* kNames[] = {
#define PYCOMM_CUDA_NAMES(source, Source, destination, Destination) \
  "pycomm_copy_" #source "_to_" #destination, "pycomm_fold_" #source "_to_" #destination,
      PYCOMM_CUDA_DTYPE_PAIRS(PYCOMM_CUDA_NAMES)
#undef PYCOMM_CUDA_NAMES
  };
  return kNames;
}

void copy_segments(Launcher& launcher, const CopySpec& spec, std::span<const Segment> segments) {
  const std::string call =
      std::string("copy of ") + name_of(spec.from_dtype) + " segments to " + name_of(spec.to_dtype);
  const Pair& pair = pair_of(spec.from_dtype, spec.to_dtype, call);
  const auto run_of = [](const void* start, DType dtype, const Segment& segment) {
    return Run{start, size_of(dtype), segment.count};
  };

  std::vector<Cut> cuts;  // nothing is launched before everything is checked
  cuts.reserve(segments.size());
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const Segment& segment = segments[s];
    const Run from = run_of(segment.from, spec.from_dtype, segment);
    const Run to = run_of(segment.to, spec.to_dtype, segment);
    if (segment.count == 0) {
      cuts.push_back({kNoVectors, 0});
      continue;
    }
    const std::string where = call + ", segment " + std::to_string(s);
    check_pointer(from, "`from`", where);
    check_pointer(to, "`to`", where);
    check_overlap(from, to, "`from`", "`to`", where);
    cuts.push_back(
        cut(from, to, copy_groups(from.element_bytes, to.element_bytes),
            [&](std::uint32_t head) { return from.on_boundary(head) && to.on_boundary(head); }));
    check_blocks(cuts.back().tiles, where);
  }

  CopyBatch batch(launcher, pair.copy, spec);
  for (std::size_t s = 0; s < segments.size(); ++s) {
    if (segments[s].count > 0) batch.add(segments[s], cuts[s]);
  }
  batch.launch();
}

void fold(Launcher& launcher, const FoldSpec& spec, void* destination,
          std::span<const void* const> sources, std::uint64_t count) {
  const std::string call = "fold of " + std::to_string(sources.size()) + " " +
                           name_of(spec.source_dtype) + " sources by " + name_of(spec.op) +
                           " into " + name_of(spec.destination_dtype) + " on a GPU";
  const Pair& pair = pair_of(spec.source_dtype, spec.destination_dtype, call);
  if (sources.empty()) refuse(call, "there is nothing to fold. Pass at least one source.");
  if (sources.size() > kMaxSources) {
    refuse(call, "one launch takes at most " + std::to_string(kMaxSources) +
                     ". Fold the first ones into " + name_of(accumulator_of(spec.source_dtype)) +
                     ", then that and the rest.");
  }
  if (!can_reduce(spec.source_dtype, spec.op)) {
    refuse(call, std::string(name_of(spec.op)) + " needs an integer dtype or bool.");
  }
  if (spec.divisor < 1) {
    refuse(call, "the divisor is " + std::to_string(spec.divisor) + ". Pass a positive one.");
  }
  if (count == 0) return;

  const Run to{destination, size_of(spec.destination_dtype), count};
  check_pointer(to, "the destination", call);
  for (std::size_t s = 0; s < sources.size(); ++s) {
    const std::string name = "source " + std::to_string(s);
    const Run from{sources[s], size_of(spec.source_dtype), count};
    check_pointer(from, name.c_str(), call);
    check_overlap(from, to, name.c_str(), "the destination", call);
  }

  const bool copies = sources.size() == 1 && spec.source_dtype == spec.destination_dtype &&
                      spec.divisor == 1 && spec.prescale == 1 && spec.postscale == 1;
  if (copies) {
    if (sources[0] == destination) return;
    const Segment whole{sources[0], destination, count};
    return copy_segments(launcher, {spec.source_dtype, spec.destination_dtype}, {&whole, 1});
  }

  FoldArguments arguments{};
  std::copy(sources.begin(), sources.end(), arguments.sources);
  arguments.destination = destination;
  arguments.count = count;
  arguments.prescale = accumulated(spec.source_dtype, spec.prescale);
  arguments.divisor = accumulated(spec.source_dtype, spec.divisor);
  arguments.postscale = accumulated(spec.source_dtype, spec.postscale);
  arguments.source_count = static_cast<std::uint32_t>(sources.size());
  arguments.op = spec.op;
  const Run first{sources[0], size_of(spec.source_dtype), count};
  const Cut cut = cuda::cut(first, to, kFoldGroups, [&](std::uint32_t head) {
    return to.on_boundary(head) &&
           std::all_of(sources.begin(), sources.end(), [&](const void* source) {
             return Run{source, first.element_bytes, count}.on_boundary(head);
           });
  });
  check_blocks(cut.tiles, call);
  arguments.head = cut.head;
  launcher.launch(pair.fold, static_cast<std::uint32_t>(cut.tiles), &arguments);
}

}  // namespace pycomm::cuda
