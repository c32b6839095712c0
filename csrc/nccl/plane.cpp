#include "nccl/plane.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "collectives/open.h"
#include "collectives/run.h"
#include "nccl/cards.h"
#include "nccl/communicator.h"
#include "nccl/device.h"
#include "nccl/launch.h"
#include "nccl/memory.h"
#include "nccl/pack.h"
#include "nccl/registry.h"

namespace pycomm::nccl {
namespace {

using Clock = std::chrono::steady_clock;

/// A call's place in the launch order, until it was launched or has failed.
class Place {
 public:
  Place(LaunchOrder& order, std::uint64_t group)
      : order_(order), group_(group), proposal_(order.propose(group)) {}
  ~Place() { order_.leave(group_); }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  std::uint64_t proposal() const { return proposal_; }
  void agree(std::uint64_t tick) { order_.agree(group_, tick); }

  /// Waits for the call's turn.
  class Next final : public Wait {
   public:
    explicit Next(const Place& place) : place_(place) {}
    bool poll() override { return place_.order_.is_next(place_.group_); }
    std::string describe() const override {
      return "the GPU calls of other groups that come before it";
    }
    bool rings_doorbell() const override { return false; }

   private:
    const Place& place_;
  };

 private:
  LaunchOrder& order_;
  const std::uint64_t group_;
  const std::uint64_t proposal_;
};

/// While a call is on its way to NCCL.
class Launching {
 public:
  explicit Launching(bool& flag) : flag_(flag) { flag_ = true; }
  ~Launching() { flag_ = false; }
  Launching(const Launching&) = delete;
  Launching& operator=(const Launching&) = delete;

 private:
  bool& flag_;
};

class NcclGroup final : public GpuGroup {
 public:
  NcclGroup(std::shared_ptr<Device> device, std::uint64_t id)
      : device_(std::move(device)), id_(id) {}
  ~NcclGroup() override;

  Task<> run(Context& context, const Operation& operation) override;
  bool in_flight() const override { return !launched_.empty() || registry_.has_abandoned(); }
  void poll() override;
  void abort() override;

 private:
  struct Launched {
    std::shared_ptr<Call> call;
    std::string description;
    Clock::time_point began;
    double timeout_s;
  };

  Task<> carry_out(Context& context, const Operation& operation);
  Task<> connect(Context& context);
  Card own_card(int rank) const;

  const std::shared_ptr<Device> device_;
  const std::uint64_t id_;
  Registry registry_;  // its memory outlives the communicator
  std::unique_ptr<Communicator> communicator_;
  std::deque<Launched> launched_;  // in the order of the stream
  bool launching_ = false;
};

Task<> NcclGroup::run(Context& context, const Operation& operation) {
  const auto began = Clock::now();
  const auto call = std::static_pointer_cast<Call>(operation.device_call);
  Place place(device_->order, id_);
  const std::string description = describe_call(context, operation);
  place.agree(co_await open_with_largest(context, operation, place.proposal()));
  if (communicator_ == nullptr) co_await connect(context);
  Place::Next next(place);
  co_await until(next);
  const Launching launching(launching_);
  Communicator::Accepted accepted(*communicator_);
  co_await until(accepted);  // memory may be on its way out
  if (operation.kind == Kind::kAllocateOnDevice) {
    co_await registry_.add(context, *communicator_, operation.device_memory);
    co_return;
  }
  {
    const Device::Current current(*device_);
    call->begin();
    launch(*communicator_, operation, context.rank, context.size());
  }
  co_await until(accepted);
  call->end();
  launched_.push_back({call, description, began, operation.timeout_s});
}

Card NcclGroup::own_card(int rank) const {
  Card card;
  card.set_bus_id(device_->bus_id);
  if (!device_->nccl) {
    card.set_problem(device_->nccl_problem);
    return card;
  }
  card.nccl_version = device_->nccl->version;
  ncclUniqueId id{};
  static_assert(sizeof(id.internal) == sizeof(card.unique_id));
  if (rank == 0) {
    const ncclResult_t result = device_->nccl->ncclGetUniqueId(&id);
    if (result != ncclSuccess) {
      card.set_problem(std::string("ncclGetUniqueId failed: ") +
                       device_->nccl->ncclGetErrorString(result) +
                       ". NCCL_DEBUG=WARN makes NCCL say more.");
    }
  }
  std::memcpy(card.unique_id.data(), id.internal, sizeof(id.internal));
  return card;
}

Task<> NcclGroup::connect(Context& context) {
  const Card mine = own_card(context.rank);
  std::vector<Card> cards(static_cast<std::size_t>(context.size()));
  Operation gather;
  gather.kind = Kind::kAllGather;
  gather.count = sizeof(Card);
  gather.input = reinterpret_cast<const std::byte*>(&mine);
  gather.output = reinterpret_cast<std::byte*>(cards.data());
  gather.name = "connecting GPUs";
  ++context.sequence;
  co_await run_collective(context, gather);
  if (const std::string problem = problem_of(cards, context.placement); !problem.empty()) {
    throw RefusedError("this group's GPUs cannot be connected: " + problem);
  }
  ncclUniqueId id;
  std::memcpy(id.internal, cards[0].unique_id.data(), sizeof(id.internal));
  auto communicator = std::make_unique<Communicator>(device_, id, context.size(), context.rank);
  Communicator::Accepted connected(*communicator);
  co_await until(connected);
  communicator_ = std::move(communicator);
}

void NcclGroup::poll() {
  while (!launched_.empty() && launched_.front().call->finished()) launched_.pop_front();
  if (launched_.empty()) {
    if (!launching_ && communicator_ != nullptr) registry_.drop_abandoned(*communicator_);
    return;
  }
  const Launched& first = launched_.front();
  communicator_->accepted();
  const double seconds = std::chrono::duration<double>(Clock::now() - first.began).count();
  if (seconds <= first.timeout_s) return;
  char waited[32];
  std::snprintf(waited, sizeof(waited), "%.1f s", seconds);
  throw CommTimeoutError(first.description + ": timeout after " + waited +
                         "; it was launched, and the GPU has not finished it.\n  A GPU of the "
                         "group hangs or waits for work before the call. Read the other ranks' "
                         "logs; if it is only slow, raise the timeout.");
}

void NcclGroup::abort() {
  if (communicator_ != nullptr) communicator_->abort();
  launched_.clear();
  registry_.clear();
}

NcclGroup::~NcclGroup() {
  try {
    while (in_flight()) {
      poll();
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (communicator_ != nullptr) registry_.withdraw(*communicator_);
  } catch (const CommError&) {
    abort();
  }
}

class CudaPlane final : public Plane {
 public:
  explicit CudaPlane(const Places& places) : places_(places) {}

  void issue(Operation& operation) override {
    if (const std::string problem = problem_of(operation); !problem.empty()) {
      throw InvalidArgumentError(std::string(name_of(operation.kind)) + ": " + problem);
    }
    operation.algorithm = Algorithm::kNccl;
    const auto gpu = device(operation);
    if (operation.kind == Kind::kAllocateOnDevice) {
      operation.device_memory = std::make_shared<Memory>(gpu, operation.count, operation.stream);
    }
    operation.device_call = std::make_shared<Call>(gpu, operation.stream);
  }

  void copy(DType dtype, std::span<const cuda::Segment> segments, StreamAddress stream) override {
    packer_->copy(dtype, segments, stream);
  }

  void order(StreamAddress earlier, StreamAddress later) override {
    Event event(device_);
    event.record(stream_at(earlier));
    event.order_before(stream_at(later));
  }

  std::unique_ptr<GpuGroup> join(std::uint64_t id) override {
    std::lock_guard lock(mutex_);
    return std::make_unique<NcclGroup>(device_, id);
  }

 private:
  std::shared_ptr<Device> device(const Operation& operation) {
    std::lock_guard lock(mutex_);
    if (device_ == nullptr) {
      device_ = std::make_shared<Device>(places_, operation.device);
      packer_ = std::make_unique<Packer>(device_, places_.kernels);
    }
    if (device_->ordinal != operation.device) {
      throw InvalidArgumentError(
          std::string(name_of(operation.kind)) + ": the tensor is on GPU " +
          std::to_string(operation.device) + ", and this rank communicates from GPU " +
          std::to_string(device_->ordinal) +
          ".\n  A rank uses one GPU: call torch.cuda.set_device(pycomm.local_rank()) first.");
    }
    return device_;
  }

  const Places places_;
  std::mutex mutex_;
  std::shared_ptr<Device> device_;  // from the first `issue` on
  std::unique_ptr<Packer> packer_;
};

}  // namespace

std::unique_ptr<Plane> make_plane(const Places& places) {
  return std::make_unique<CudaPlane>(places);
}

}  // namespace pycomm::nccl
