#include "limits/machine_limit.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <span>
#include <utility>

#include "collectives/partition.h"
#include "core/clock.h"
#include "core/error.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

/// What show() copies at most.
constexpr std::size_t kShownBytes = 64 << 10;
constexpr std::size_t kLineBytes = 128;

/// A waiting rank gives its core away after so many looks: the other one may need it.
constexpr int kLooksBeforeYield = 10000;

/// What a clock read twice says at least. It lies in every time taken, and next to a cache line's
/// round trip it is no small part.
Clock::duration clock_cost() {
  Clock::duration least = Clock::duration::max();
  for (int reading = 0; reading < 1000; ++reading) {
    const auto began = Clock::now();
    least = std::min(least, Clock::now() - began);
  }
  return least;
}

double seconds_since(Clock::time_point began) {
  const Clock::duration taken = Clock::now() - began;
  static const Clock::duration cost = clock_cost();
  return std::chrono::duration<double>(std::max(taken - cost, Clock::duration::zero())).count();
}

struct Offsets {
  std::uint64_t buffer;
  std::uint64_t page;
};

std::vector<Offsets> exchange(Group& group, const Offsets& mine) {
  std::vector<Offsets> all(static_cast<std::size_t>(group.size()));
  Operation operation;
  operation.kind = Kind::kAllGather;
  operation.count = sizeof(Offsets);
  operation.input = reinterpret_cast<const std::byte*>(&mine);
  operation.output = reinterpret_cast<std::byte*>(all.data());
  operation.name = "machine limit";
  group.run(std::move(operation), [] {});
  return all;
}

}  // namespace

struct MachineLimit::Line {
  std::atomic<std::uint64_t> value;
};

MachineLimit::MachineLimit(Group& group, std::shared_ptr<ArenaBlock> buffer)
    : rank_(group.rank()),
      buffer_(std::move(buffer)),
      page_(group.allocate(kLineBytes + kShownBytes)),
      folded_(kShownBytes) {
  if (group.placement().host_count() > 1) {
    throw InvalidArgumentError("machine limit on rank " + std::to_string(rank_) +
                               ": the group spans several hosts. Use a group of one host's ranks.");
  }
  const auto all = exchange(group, {buffer_->offset(), page_->offset()});
  for (int rank = 0; rank < group.size(); ++rank) {
    const Offsets& theirs = all[static_cast<std::size_t>(rank)];
    buffers_.push_back(group.mapped(rank, theirs.buffer, buffer_->bytes()));
    pages_.push_back(group.mapped(rank, theirs.page, page_->bytes()));
  }
}

MachineLimit::Line& MachineLimit::line_of(int rank) const {
  return *reinterpret_cast<Line*>(pages_[static_cast<std::size_t>(rank)]);
}

double MachineLimit::fold_part(std::size_t count, DType dtype) const {
  const std::size_t element = size_of(dtype);
  if (count * element > buffer_->bytes())
    throw InvalidArgumentError("fold_part: too many elements.");
  const Range part =
      partition(count, static_cast<int>(buffers_.size()), rank_, kLineBytes / element);
  std::vector<std::byte*> destinations;
  for (std::byte* const theirs : buffers_) destinations.push_back(theirs + part.begin * element);
  const std::vector<const std::byte*> sources(destinations.begin(), destinations.end());
  const auto began = Clock::now();
  fold_to_all({dtype, dtype, ReduceOp::kSum}, destinations, sources, part.count());
  return seconds_since(began);
}

double MachineLimit::show(std::size_t count, DType dtype) const {
  const std::size_t bytes = count * size_of(dtype);
  if (bytes > kShownBytes || bytes > buffer_->bytes()) {
    throw InvalidArgumentError("show: too many elements.");
  }
  std::byte* const shown = pages_[static_cast<std::size_t>(rank_)] + kLineBytes;
  const auto began = Clock::now();
  std::memcpy(shown, buffer_->data(), bytes);
  return seconds_since(began);
}

double MachineLimit::fold_shown(std::size_t count, DType dtype) {
  if (count * size_of(dtype) > kShownBytes) {
    throw InvalidArgumentError("fold_shown: too many elements.");
  }
  std::vector<const std::byte*> sources;
  for (const std::byte* const page : pages_) sources.push_back(page + kLineBytes);
  const auto began = Clock::now();
  fold({dtype, dtype, ReduceOp::kSum}, folded_.data(), sources, count);
  return seconds_since(began);
}

double MachineLimit::round_trip(int trips) {
  if (buffers_.size() < 2 || rank_ > 1) return 0;
  // Each rank writes its own line and reads the other's, as announcements do.
  std::atomic<std::uint64_t>& mine = line_of(rank_).value;
  const std::atomic<std::uint64_t>& theirs = line_of(1 - rank_).value;
  const std::uint64_t first = mine.load(std::memory_order_relaxed);
  const auto await = [&](std::uint64_t value) {
    for (int looks = 0; theirs.load(std::memory_order_acquire) < value; ++looks) {
      if (looks > kLooksBeforeYield) sched_yield();
    }
  };
  const auto began = Clock::now();
  for (std::uint64_t trip = 1; trip <= static_cast<std::uint64_t>(trips); ++trip) {
    if (rank_ == 1) await(first + trip);
    mine.store(first + trip, std::memory_order_release);
    if (rank_ == 0) await(first + trip);
  }
  return seconds_since(began) / trips;
}

double time_all_reduces(Group& group, const std::vector<std::byte*>& buffers, std::size_t count,
                        DType dtype) {
  const auto began = Clock::now();
  for (std::byte* const buffer : buffers) {
    Operation operation;
    operation.kind = Kind::kAllReduce;
    operation.dtype = dtype;
    operation.count = count;
    operation.input = buffer;
    operation.output = buffer;
    group.run(std::move(operation), [] {});
  }
  return seconds_since(began);
}

}  // namespace pycomm
