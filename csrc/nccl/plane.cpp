#include "nccl/plane.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "collectives/block_counts.h"
#include "collectives/open.h"
#include "nccl/cards.h"
#include "nccl/choice.h"
#include "nccl/communicator.h"
#include "nccl/device.h"
#include "nccl/drain.h"
#include "nccl/everyones.h"
#include "nccl/exact_order.h"
#include "nccl/in_flight.h"
#include "nccl/launch.h"
#include "nccl/memory.h"
#include "nccl/nccl_carrier.h"
#include "nccl/pack.h"
#include "nccl/pair.h"
#include "nccl/place.h"
#include "nccl/registry.h"
#include "nccl/staged.h"
#include "nccl/staged_pair.h"

namespace pycomm::nccl {
namespace {

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
  bool in_flight() const override { return !calls_.empty() || registry_.has_abandoned(); }
  std::string describe() const override { return calls_.describe(); }
  void poll() override;
  void abort() override;

 private:
  /// Open a call and give it its place in the launch order.
  Task<> open(Context& context, const Operation& operation, std::optional<Place>& place);
  Task<> connect(Context& context);
  /// @throws RefusedError  these ranks cannot reduce in exact order.
  void check_exact_order(const Context& context, const Operation& operation) const;

  const std::shared_ptr<Device> device_;
  const std::uint64_t id_;
  Registry registry_;  // its memory outlives the communicator
  std::unique_ptr<Communicator> communicator_;
  // What the ranks' cards say about exact order.
  std::string kernels_problem_;
  std::size_t scratch_bytes_ = 0;
  InFlight calls_;
  bool launching_ = false;
};

Task<> NcclGroup::run(Context& context, const Operation& operation) {
  const auto began = Clock::now();
  const auto call = std::static_pointer_cast<Call>(operation.device_call);
  const std::string description = describe_call(context, operation);
  std::optional<Place> place;
  co_await open(context, operation, place);
  if (const std::string problem = unsupported(operation); !problem.empty()) {
    throw RefusedError(std::string(name_of(operation.kind)) + ": " + problem);
  }
  if (has_block_counts(operation)) co_await compare_block_counts(context, operation);
  if (communicator_ == nullptr) co_await connect(context);
  Place::Next next(*place);
  co_await until(next);
  const Launching launching(launching_);
  Communicator::Accepted accepted(*communicator_);
  co_await until(accepted);  // memory may be on its way out
  if (operation.kind == Kind::kAllocateOnDevice) {
    co_await registry_.add(context, *communicator_, operation.device_memory);
    co_return;
  }
  if (needs_exact_order(operation)) {
    check_exact_order(context, operation);
    call->begin();
    NcclCarrier carrier(*communicator_);
    co_await reduce_in_exact_order(carrier, operation, context.placement, context.rank,
                                   {device_->scratch(), scratch_bytes_});
  } else {
    const Device::Current current(*device_);
    call->begin();
    launch(*communicator_, operation, context.rank, context.size());
  }
  co_await until(accepted);
  call->end();
  calls_.add(call, description, began, operation.timeout_s);
}

Task<> NcclGroup::open(Context& context, const Operation& operation, std::optional<Place>& place) {
  // A rank with messages proposes only once all ranks have begun the call: see LaunchOrder.
  constexpr std::uint64_t kLater = std::numeric_limits<std::uint64_t>::max();
  if (!device_->has_messages) place.emplace(device_->order, id_);
  std::uint64_t tick =
      co_await open_with_largest(context, operation, place ? place->proposal() : kLater);
  if (tick == kLater) {
    if (!place) place.emplace(device_->order, id_);
    const std::vector<std::uint64_t> proposals =
        co_await everyones(context, place->proposal(), "the order of GPU calls");
    tick = *std::max_element(proposals.begin(), proposals.end());
  }
  place->agree(tick);
}

Task<> NcclGroup::connect(Context& context) {
  const Card mine = device_->card(/*makes_id=*/context.rank == 0);
  const std::vector<Card> cards = co_await gather_cards(context, mine, "connecting GPUs");
  if (const std::string problem = problem_of(cards, context.placement); !problem.empty()) {
    throw RefusedError("this group's GPUs cannot be connected: " + problem);
  }
  kernels_problem_ = kernels_problem_of(cards);
  scratch_bytes_ = least_scratch_of(cards);
  ncclUniqueId id;
  std::memcpy(id.internal, cards[0].unique_id.data(), sizeof(id.internal));
  auto communicator = std::make_unique<Communicator>(device_, id, context.size(), context.rank);
  Communicator::Accepted connected(*communicator);
  co_await until(connected);
  communicator_ = std::move(communicator);
}

void NcclGroup::check_exact_order(const Context& context, const Operation& operation) const {
  std::string problem = kernels_problem_;
  if (problem.empty()) {
    problem = problem_of_exact_order(operation, context.placement, scratch_bytes_);
  }
  if (problem.empty()) return;
  throw RefusedError(describe_call(context, operation) +
                     ": this group's GPUs cannot reduce in exact order: " + problem);
}

void NcclGroup::poll() {
  if (!calls_.empty()) calls_.poll(*communicator_);
  if (calls_.empty() && !launching_ && communicator_ != nullptr) {
    registry_.drop_abandoned(*communicator_);
  }
}

void NcclGroup::abort() {
  if (communicator_ != nullptr) communicator_->abort();
  calls_.clear();
  registry_.clear();
}

NcclGroup::~NcclGroup() {
  try {
    drain(*this);
    if (communicator_ != nullptr) registry_.withdraw(*communicator_);
  } catch (const CommError&) {
    abort();
  }
}

class CudaPlane final : public Plane {
 public:
  CudaPlane(const Places& places, Transport transport, MpiProblem mpi_problem)
      : places_(places),
        transport_(transport),
        mpi_(std::make_shared<MpiAnswer>(std::move(mpi_problem))) {}

  void issue(Operation& operation) override {
    const bool in_order = operation.algorithm == Algorithm::kExactOrder;
    if (operation.algorithm != Algorithm::kAuto && !in_order) {
      throw InvalidArgumentError(
          std::string(name_of(operation.kind)) + ": algorithm is " + name_of(operation.algorithm) +
          ", and on GPUs there is none to choose.\n  Pass algorithm=None, or "
          "CPU tensors.");
    }
    operation.algorithm = in_order ? Algorithm::kGpuExactOrder : Algorithm::kGpu;
    const auto gpu = device(name_of(operation.kind), operation.device);
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

  std::shared_ptr<DeviceCall> record(const char* call, int ordinal, StreamAddress stream) override {
    const auto gpu = device(call, ordinal);
    gpu->has_messages = true;
    return std::make_shared<Call>(gpu, stream);
  }

  std::unique_ptr<GpuGroup> join(std::uint64_t id) override {
    std::lock_guard lock(mutex_);
    const auto on_nccl = [device = device_, id]() -> std::unique_ptr<GpuGroup> {
      return std::make_unique<NcclGroup>(device, id);
    };
    switch (transport_) {
      case Transport::kNccl:
        return on_nccl();
      case Transport::kStaged:
        return make_staged_group(device_);
      case Transport::kAuto:
      case Transport::kMpi:
        break;
    }
    return make_choosing_group(device_, transport_, mpi_, on_nccl);
  }

  std::unique_ptr<GpuPair> join(const Pairing& pairing) override {
    std::lock_guard lock(mutex_);
    switch (transport_) {
      case Transport::kNccl:
        return make_nccl_pair(device_, pairing);
      case Transport::kAuto:
        return make_choosing_pair(device_, pairing);
      case Transport::kStaged:
      case Transport::kMpi:
        break;
    }
    return make_staged_pair(device_, pairing);
  }

 private:
  std::shared_ptr<Device> device(const char* call, int ordinal) {
    std::lock_guard lock(mutex_);
    if (device_ == nullptr) {
      device_ = std::make_shared<Device>(places_, ordinal);
      packer_ = std::make_unique<Packer>(device_);
    }
    if (device_->ordinal != ordinal) {
      throw InvalidArgumentError(
          std::string(call) + ": the tensor is on GPU " + std::to_string(ordinal) +
          ", and this rank communicates from GPU " + std::to_string(device_->ordinal) +
          ".\n  A rank uses one GPU: call torch.cuda.set_device(pycomm.local_rank()) first.");
    }
    return device_;
  }

  const Places places_;
  const Transport transport_;
  const std::shared_ptr<MpiAnswer> mpi_;
  std::mutex mutex_;
  std::shared_ptr<Device> device_;  // from the first `issue` on
  std::unique_ptr<Packer> packer_;
};

}  // namespace

std::unique_ptr<Plane> make_plane(const Places& places, Transport transport,
                                  MpiProblem mpi_problem) {
  return std::make_unique<CudaPlane>(places, transport, std::move(mpi_problem));
}

}  // namespace pycomm::nccl
