#include "nccl/staged.h"

#include <algorithm>
#include <list>
#include <mutex>
#include <string>
#include <utility>

#include "collectives/block_counts.h"
#include "collectives/open.h"
#include "collectives/run.h"
#include "nccl/carried.h"
#include "nccl/drain.h"
#include "nccl/in_flight.h"
#include "nccl/mpi_carrier.h"
#include "nccl/pieces.h"
#include "nccl/slots.h"

namespace pycomm::nccl {
namespace {

using Buckets = std::list<std::shared_ptr<DeviceMemory>>;

/// To the end of the process: a GPU that hangs may still write there when it goes on.
void keep(Buckets buckets) {
  static std::mutex mutex;
  static auto* const kept = new Buckets();  // never destroyed
  std::lock_guard lock(mutex);
  kept->splice(kept->end(), buckets);
}

class StagedGroup final : public GpuGroup {
 public:
  StagedGroup(std::shared_ptr<Device> device, std::optional<GpuAwareMpi> mpi)
      : device_(std::move(device)), mpi_(mpi) {}
  ~StagedGroup() override;

  Task<> run(Context& context, const Operation& operation) override;
  bool in_flight() const override;
  std::string describe() const override { return calls_.describe(); }
  void poll() override;
  void abort() override;

 private:
  Slots& slots_on_host(Context& context, std::size_t slot_bytes);
  Slots& slots_on_gpu(std::size_t slot_bytes);

  const std::shared_ptr<Device> device_;
  const std::optional<GpuAwareMpi> mpi_;
  // From the first call on that goes through them.
  std::unique_ptr<Slots> on_host_;
  std::unique_ptr<Slots> on_gpu_;
  std::shared_ptr<Call> last_;
  InFlight calls_;
  Buckets buckets_;
  bool aborted_ = false;
};

Task<> StagedGroup::run(Context& context, const Operation& operation) {
  const auto began = Clock::now();
  const auto call = std::static_pointer_cast<Call>(operation.device_call);
  const std::string description = describe_call(context, operation);
  const std::size_t slot_bytes =
      std::max(context.staging.gpu_slot_bytes, Pieces::least_slot_bytes(context.size()));
  const Pieces pieces(operation, context.rank, context.size(), slot_bytes);
  const std::size_t count =
      pieces.count(co_await open_with_largest(context, operation, pieces.longest()));
  if (operation.kind == Kind::kAllocateOnDevice) {
    buckets_.push_back(operation.device_memory);
    co_return;
  }
  std::optional<MpiCarrier> carrier;
  if (mpi_ && can_be_carried(operation, context.placement, mpi_->scratch_bytes)) {
    carrier.emplace(device_, *context.channel, context.tag, context.rank, context.world_ranks);
    if (has_block_counts(operation)) co_await compare_block_counts(context, operation);
  }
  Slots& slots = carrier ? slots_on_gpu(slot_bytes) : slots_on_host(context, slot_bytes);
  slots.begin(*call);
  if (last_ != nullptr) slots.follow(*last_);  // this one may read what it wrote
  const auto copy_down = [&](std::size_t i) { slots.copy_down(pieces.down(i, slots.of(i)), i); };
  if (count > 0) copy_down(0);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + 1 < count) copy_down(i + 1);
    Passed filled = slots.filled(i);
    co_await until(filled);
    Passed emptied = slots.emptied(i);
    co_await until(emptied);
    const Operation part = pieces.part(i, slots.of(i));
    if (carrier) {
      co_await run_carried(*carrier, part, context.placement, context.rank, slots.scratch());
      slots.up_follows(device_->stream);
    } else {
      context.begin_part();
      co_await run_collective(context, part);
    }
    slots.copy_up(pieces.up(i, slots.of(i)), i);
  }
  slots.end(*call);
  last_ = call;
  calls_.add(call, description, began, operation.timeout_s);
}

Slots& StagedGroup::slots_on_host(Context& context, std::size_t slot_bytes) {
  if (on_host_ == nullptr) on_host_ = Slots::on_host(device_, context.arena, slot_bytes);
  return *on_host_;
}

Slots& StagedGroup::slots_on_gpu(std::size_t slot_bytes) {
  if (on_gpu_ == nullptr) on_gpu_ = Slots::on_gpu(device_, slot_bytes, mpi_->scratch_bytes);
  return *on_gpu_;
}

bool StagedGroup::in_flight() const {
  if (aborted_) return false;
  return !calls_.empty() || std::any_of(buckets_.begin(), buckets_.end(),
                                        [](const auto& memory) { return memory.use_count() == 1; });
}

void StagedGroup::poll() {
  calls_.poll();
  // To free memory waits for the GPU: not while it works for this group.
  if (calls_.empty()) {
    buckets_.remove_if([](const auto& memory) { return memory.use_count() == 1; });
  }
}

void StagedGroup::abort() {
  aborted_ = true;
  calls_.clear();
}

StagedGroup::~StagedGroup() {
  try {
    drain(*this);
  } catch (const CommError&) {
    abort();
  }
  const bool host_is_left = Slots::leave(std::move(on_host_), aborted_);
  const bool gpu_is_left = Slots::leave(std::move(on_gpu_), aborted_);
  if (!host_is_left || !gpu_is_left) keep(std::move(buckets_));
}

}  // namespace

std::unique_ptr<GpuGroup> make_staged_group(std::shared_ptr<Device> device,
                                            std::optional<GpuAwareMpi> mpi) {
  return std::make_unique<StagedGroup>(std::move(device), mpi);
}

}  // namespace pycomm::nccl
