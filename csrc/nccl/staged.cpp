#include "nccl/staged.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <list>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/open.h"
#include "collectives/run.h"
#include "nccl/in_flight.h"
#include "nccl/pieces.h"
#include "nccl/pinned.h"

namespace pycomm::nccl {
namespace {

/// How long the end of a failed group waits for a GPU that may hang.
constexpr auto kPatience = std::chrono::seconds(1);

/// Waits until the GPU has made a copy.
class Copied final : public Wait {
 public:
  explicit Copied(const Event& event) : event_(event) {}
  bool poll() override { return event_.passed(); }
  std::string describe() const override {
    return "this rank's GPU to copy a piece to or from the host";
  }
  bool rings_doorbell() const override { return false; }

 private:
  const Event& event_;
};

/// What the pieces of a group's tensors go through.
struct Slots {
  struct Slot {
    explicit Slot(const std::shared_ptr<const Device>& device) : filled(device), emptied(device) {}
    Event filled;   // by the last copy down
    Event emptied;  // by the last copy up
  };
  static constexpr std::size_t kCount = 3;

  Slots(const std::shared_ptr<Device>& device, Arena& arena, std::size_t slot_bytes)
      : down(device),
        up(device),
        slot_bytes(slot_bytes),
        memory(device, arena, kCount * slot_bytes) {}

  Slot& of(std::size_t piece) { return slots[piece % kCount]; }
  std::byte* memory_of(std::size_t piece) const {
    return memory.data() + piece % kCount * slot_bytes;
  }

  // Of this group alone: groups wait for each other nowhere.
  const Stream down;
  const Stream up;
  const std::size_t slot_bytes;
  PinnedMemory memory;
  std::array<Slot, kCount> slots{Slot(down.device()), Slot(down.device()), Slot(down.device())};
  Event call_ended{down.device()};  // the last one
};

using Buckets = std::list<std::shared_ptr<DeviceMemory>>;

/// What a GPU that hangs was given, and may still write when it goes on.
struct GivenAway {
  std::unique_ptr<Slots> slots;
  Buckets buckets;
};

/// To the end of the process.
void keep(GivenAway given) {
  static std::mutex mutex;
  static auto* const kept = new std::vector<GivenAway>();  // never destroyed
  std::lock_guard lock(mutex);
  kept->push_back(std::move(given));
}

class StagedGroup final : public GpuGroup {
 public:
  explicit StagedGroup(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~StagedGroup() override;

  Task<> run(Context& context, const Operation& operation) override;
  bool in_flight() const override;
  std::string describe() const override { return calls_.describe(); }
  void poll() override;
  void abort() override;

 private:
  void copy_down(const Pieces& pieces, std::size_t piece);
  void copy_up(const Pieces& pieces, std::size_t piece);
  void copy(const std::vector<Pieces::Copy>& copies, cudaMemcpyKind direction, const Stream& on);
  /// Whether the GPU has finished with the slots; waits a little for that.
  bool idle() const;

  const std::shared_ptr<Device> device_;
  std::unique_ptr<Slots> slots_;  // from the first call on
  InFlight calls_;
  Buckets buckets_;
  bool aborted_ = false;
};

Task<> StagedGroup::run(Context& context, const Operation& operation) {
  const auto began = InFlight::Clock::now();
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
  if (slots_ == nullptr) slots_ = std::make_unique<Slots>(device_, context.arena, slot_bytes);
  call->begin_on(slots_->down.handle());
  call->begin_on(slots_->up.handle());
  slots_->call_ended.order_before(slots_->down.handle());  // this one may read what it wrote
  if (count > 0) copy_down(pieces, 0);
  for (std::size_t i = 0; i < count; ++i) {
    if (i + 1 < count) copy_down(pieces, i + 1);
    Copied filled(slots_->of(i).filled);
    co_await until(filled);
    Copied emptied(slots_->of(i).emptied);
    co_await until(emptied);
    const Operation part = pieces.part(i, slots_->memory_of(i));
    ++context.sequence;
    co_await run_collective(context, part);
    copy_up(pieces, i);
  }
  slots_->call_ended.record(slots_->up.handle());
  call->end_on(slots_->up.handle());
  calls_.add(call, description, began, operation.timeout_s);
}

void StagedGroup::copy(const std::vector<Pieces::Copy>& copies, cudaMemcpyKind direction,
                       const Stream& on) {
  const Device::Current current(*device_);
  const CudaTable& cuda = device_->cuda;
  for (const Pieces::Copy& copy : copies) {
    cuda.check(cuda.cudaMemcpyAsync(copy.to, copy.from, copy.bytes, direction, on.handle()),
               "cudaMemcpyAsync");
  }
}

void StagedGroup::copy_down(const Pieces& pieces, std::size_t piece) {
  const auto copies = pieces.down(piece, slots_->memory_of(piece));
  if (copies.empty()) return;  // this rank brings nothing, and need not wait for its GPU
  Slots::Slot& slot = slots_->of(piece);
  slot.emptied.order_before(slots_->down.handle());
  copy(copies, cudaMemcpyDeviceToHost, slots_->down);
  slot.filled.record(slots_->down.handle());
}

void StagedGroup::copy_up(const Pieces& pieces, std::size_t piece) {
  copy(pieces.up(piece, slots_->memory_of(piece)), cudaMemcpyHostToDevice, slots_->up);
  slots_->of(piece).emptied.record(slots_->up.handle());
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

bool StagedGroup::idle() const {
  Event last_down(device_);
  last_down.record(slots_->down.handle());
  Event last_up(device_);
  last_up.record(slots_->up.handle());
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (!(last_down.passed() && last_up.passed())) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return true;
}

StagedGroup::~StagedGroup() {
  try {
    drain(*this);
  } catch (const CommError&) {
    abort();
  }
  if (slots_ == nullptr) return;  // nothing was ever copied
  if (aborted_) slots_->memory.quarantine();
  bool is_idle = false;
  try {
    is_idle = idle();
  } catch (const CommError&) {
    // The GPU, or all of CUDA, is gone before us.
  }
  if (!is_idle) keep({std::move(slots_), std::move(buckets_)});
}

}  // namespace

std::unique_ptr<GpuGroup> make_staged_group(std::shared_ptr<Device> device) {
  return std::make_unique<StagedGroup>(std::move(device));
}

}  // namespace pycomm::nccl
