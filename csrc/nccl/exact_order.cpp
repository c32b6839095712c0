#include "nccl/exact_order.h"

#include <algorithm>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include "collectives/fold_specs.h"
#include "collectives/partition.h"
#include "kernels/cuda/kernels.h"
#include "nccl/spread.h"

namespace pycomm::nccl {
namespace {

/// The kernels' vectors. Blocks and pieces begin on multiples of it, if their buffers do.
constexpr std::size_t kVectorBytes = 16;

/// Complex numbers are folded as pairs of reals.
Operation in_reals(Operation operation) {
  if (!is_complex(operation.dtype)) return operation;
  operation.dtype = operation.dtype == DType::kComplex64 ? DType::kFloat32 : DType::kFloat64;
  operation.count *= 2;
  return operation;
}

/// How a rank's scratch is divided, for pieces of `count` elements of each block.
struct Room {
  std::size_t received;  // from the host's other ranks, for every block folded here
  std::size_t sums;      // one from each host, of the rank's own block
  std::size_t outgoing;  // this host's, of the other blocks folded here
  std::size_t result;    // of the rank's own block, where it does not end here

  std::size_t bytes() const { return received + sums + outgoing + result; }
};

Room room_of(const Placement& placement, int rank, DType dtype, std::size_t count) {
  const int host = placement.host_of[static_cast<std::size_t>(rank)];
  const std::size_t peers = placement.hosts[static_cast<std::size_t>(host)].size() - 1;
  std::size_t folded = 0;
  for (std::size_t owner = 0; owner < placement.host_of.size(); ++owner) {
    folded += placement.folder(host, static_cast<int>(owner)) == rank ? 1 : 0;
  }
  const std::size_t own = count * size_of(dtype);
  const std::size_t sum = count * size_of(accumulator_of(dtype));
  const auto hosts = static_cast<std::size_t>(placement.host_count());
  return {folded * peers * own, hosts > 1 ? hosts * sum : 0, (folded - 1) * sum, own};
}

/// Elements of a piece of each block: as many as every rank's scratch holds.
std::size_t piece_of(const Placement& placement, DType dtype, std::size_t scratch_bytes) {
  const std::size_t granule = kVectorBytes / size_of(dtype);
  std::size_t most = 1;
  for (std::size_t rank = 0; rank < placement.host_of.size(); ++rank) {
    most = std::max(most, room_of(placement, static_cast<int>(rank), dtype, granule).bytes());
  }
  return scratch_bytes / most * granule;
}

class ExactReduction {
 public:
  ExactReduction(Carrier& carrier, const Operation& operation, const Placement& placement, int rank,
                 std::span<std::byte> scratch)
      : carrier_(carrier),
        placement_(placement),
        rank_(rank),
        host_(placement.host_of[static_cast<std::size_t>(rank)]),
        operation_(in_reals(operation)),
        element_(size_of(operation_.dtype)),
        specs_(FoldSpecs::of(operation_, placement)),
        wire_(size_of(specs_.wire_dtype)),
        piece_count_(piece_of(placement, operation_.dtype, scratch.size())),
        room_(room_of(placement, rank, operation_.dtype, piece_count_)),
        scratch_(scratch.data()) {
    for (int owner = 0; owner < size(); ++owner) {
      if (placement.folder(host_, owner) == rank) folded_.push_back(owner);
    }
  }

  Task<> run() {
    std::size_t longest = 0;
    for (int owner = 0; owner < size(); ++owner) longest = std::max(longest, block(owner).count());
    for (begin_ = 0; begin_ < longest; begin_ += piece_count_) {
      if (size() > hosts()) co_await send_inputs();
      if (hosts() == 1) {
        fold_block(specs_.whole, rank_, result());
      } else {
        fold_sums_of_host();
        co_await send_sums();
        fold_hosts();
      }
      if (operation_.kind == Kind::kReduce) co_await send_to_root();
      if (operation_.kind == Kind::kAllReduce) co_await spread_results();
    }
  }

 private:
  int size() const { return static_cast<int>(placement_.host_of.size()); }
  int hosts() const { return placement_.host_count(); }
  int host_of(int rank) const { return placement_.host_of[static_cast<std::size_t>(rank)]; }
  /// Of this host.
  const std::vector<int>& here() const { return placement_.hosts[static_cast<std::size_t>(host_)]; }
  /// Whether inputs travel between hosts as they are, for want of another rank to fold with.
  bool sum_is_input() const { return placement_.most_ranks() == 1; }

  Range block(int owner) const {
    const std::size_t n = operation_.count;
    const auto index = static_cast<std::size_t>(owner);
    if (operation_.kind == Kind::kReduceScatter) return {index * n, (index + 1) * n};
    return partition(n, size(), owner, kVectorBytes / element_);
  }
  /// What is worked on at a time.
  Range piece(int owner) const {
    const Range whole = block(owner);
    const std::size_t begin = std::min(whole.end, whole.begin + begin_);
    return {begin, std::min(whole.end, begin + piece_count_)};
  }

  const std::byte* input(int owner) const {
    return operation_.input + piece(owner).begin * element_;
  }
  std::byte* output(int owner) const { return operation_.output + piece(owner).begin * element_; }
  /// Where this rank's block ends, or waits for its way to the root.
  std::byte* result() const {
    if (operation_.kind == Kind::kReduceScatter) return operation_.output + begin_ * element_;
    if (operation_.kind == Kind::kAllReduce || rank_ == operation_.root) return output(rank_);
    return scratch_ + room_.received + room_.sums + room_.outgoing;
  }
  /// What a rank of this host brings to the block that is the `index`-th to be folded here.
  std::byte* received(std::size_t index, int peer) const {
    const auto at = static_cast<std::size_t>(std::count_if(
        here().begin(), here().end(), [&](int other) { return other < peer && other != rank_; }));
    return scratch_ + (index * (here().size() - 1) + at) * piece_count_ * element_;
  }
  std::byte* sum_of(int host) const {
    return scratch_ + room_.received + static_cast<std::size_t>(host) * piece_count_ * wire_;
  }
  /// This host's sum for another host's rank, which owns the block.
  const std::byte* outgoing(int owner) const {
    return sum_is_input() ? input(owner) : outgoing_place(owner);
  }
  std::byte* outgoing_place(int owner) const {
    const auto at =
        static_cast<std::size_t>(std::count_if(folded_.begin(), folded_.end(), [&](int other) {
          return other < owner && other != rank_;
        }));
    return scratch_ + room_.received + room_.sums + at * piece_count_ * wire_;
  }

  Task<> send_inputs() {
    Exchange messages(element_);
    for (int owner = 0; owner < size(); ++owner) {
      const int folder = placement_.folder(host_, owner);
      if (folder != rank_) messages.send(folder, input(owner), piece(owner).count());
    }
    for (std::size_t index = 0; index < folded_.size(); ++index) {
      for (const int peer : here()) {
        if (peer == rank_) continue;
        messages.receive(peer, received(index, peer), piece(folded_[index]).count());
      }
    }
    co_await carrier_.carry(messages);
  }

  /// What this host's ranks bring to a block.
  void fold_block(const FoldSpec& spec, int owner, std::byte* destination) {
    const auto index = static_cast<std::size_t>(std::find(folded_.begin(), folded_.end(), owner) -
                                                folded_.begin());
    std::vector<const void*> sources;
    for (const int peer : here()) {
      sources.push_back(peer == rank_ ? input(owner) : received(index, peer));
    }
    fold(spec, destination, sources, piece(owner).count());
  }

  void fold_sums_of_host() {
    if (sum_is_input()) return;
    for (const int owner : folded_) {
      fold_block(specs_.of_host, owner, owner == rank_ ? sum_of(host_) : outgoing_place(owner));
    }
  }

  Task<> send_sums() {
    Exchange messages(wire_);
    for (const int owner : folded_) {
      if (owner != rank_) messages.send(owner, outgoing(owner), piece(owner).count());
    }
    for (int host = 0; host < hosts(); ++host) {
      if (host == host_) continue;
      messages.receive(placement_.folder(host, rank_), sum_of(host), piece(rank_).count());
    }
    co_await carrier_.carry(messages);
  }

  void fold_hosts() {
    std::vector<const void*> sources;
    for (int host = 0; host < hosts(); ++host) {
      sources.push_back(host == host_ && sum_is_input() ? input(rank_) : sum_of(host));
    }
    fold(specs_.of_hosts, result(), sources, piece(rank_).count());
  }

  Task<> send_to_root() {
    Exchange messages(element_);
    if (rank_ != operation_.root) {
      messages.send(operation_.root, result(), piece(rank_).count());
    } else {
      for (int owner = 0; owner < size(); ++owner) {
        if (owner != rank_) messages.receive(owner, output(owner), piece(owner).count());
      }
    }
    co_await carrier_.carry(messages);
  }

  Task<> spread_results() {
    std::vector<std::span<std::byte>> blocks;
    for (int owner = 0; owner < size(); ++owner) {
      blocks.emplace_back(output(owner), piece(owner).count() * element_);
    }
    return spread(carrier_, placement_, rank_, std::move(blocks));
  }

  void fold(const FoldSpec& spec, std::byte* destination, std::span<const void* const> sources,
            std::size_t count) {
    const Device& device = carrier_.device();
    const Device::Current current(device);
    Kernels::StreamLauncher launcher(*device.kernels(), device.stream);
    cuda::fold(launcher, spec, destination, sources, count);
  }

  Carrier& carrier_;
  const Placement& placement_;
  const int rank_;
  const int host_;
  const Operation operation_;
  const std::size_t element_;
  const FoldSpecs specs_;
  const std::size_t wire_;
  const std::size_t piece_count_;
  const Room room_;
  std::byte* const scratch_;
  std::vector<int> folded_;  // owners of the blocks that this rank folds its host's part of
  std::size_t begin_ = 0;    // of the piece, in each block
};

}  // namespace

bool needs_exact_order(const Operation& operation) {
  return operation.algorithm == Algorithm::kGpuExactOrder && is_scalable(operation.dtype);
}

std::string problem_of_exact_order(const Operation& operation, const Placement& placement,
                                   std::size_t scratch_bytes) {
  const auto most =
      static_cast<std::size_t>(std::max(placement.most_ranks(), placement.host_count()));
  if (most > cuda::kMaxSources) {
    return "it folds at most " + std::to_string(cuda::kMaxSources) +
           " ranks of a host, and as many hosts; there are " + std::to_string(most) + ".";
  }
  if (piece_of(placement, in_reals(operation).dtype, scratch_bytes) == 0) {
    return std::to_string(scratch_bytes) + " bytes of scratch are too little for " +
           std::to_string(placement.host_of.size()) + " ranks.";
  }
  return "";
}

Task<> reduce_in_exact_order(Carrier& carrier, const Operation& operation,
                             const Placement& placement, int rank, std::span<std::byte> scratch) {
  ExactReduction run(carrier, operation, placement, rank, scratch);
  co_await run.run();
}

}  // namespace pycomm::nccl
