#include "nccl/pair.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "nccl/cards.h"
#include "nccl/communicator.h"
#include "nccl/drain.h"
#include "nccl/in_flight.h"
#include "nccl/launch.h"
#include "nccl/place.h"

namespace pycomm::nccl {
namespace {

class NcclPair final : public GpuPair {
 public:
  NcclPair(std::shared_ptr<Device> device, const Pairing& pairing)
      : device_(std::move(device)), pairing_(pairing) {}
  ~NcclPair() override;

  std::vector<std::byte> propose() override;
  Task<> launch(std::vector<GpuMessage> batch, std::vector<std::byte> theirs) override;
  bool in_flight() const override { return !in_flight_.empty(); }
  std::string describe() const override { return in_flight_.describe(); }
  void poll() override;
  void abort() override;

 private:
  /// What the ranks tell each other before a batch; the card until they are connected.
  struct Proposal {
    std::uint64_t tick;
    Card card;
  };

  /// The lower rank is 0 of the two, and brings the unique id.
  bool is_lower() const { return pairing_.rank <= pairing_.peer; }
  bool is_alone() const { return pairing_.rank == pairing_.peer; }
  Task<> connect(const Card& theirs);

  const std::shared_ptr<Device> device_;
  const Pairing pairing_;
  Card mine_;
  std::optional<Place> place_;  // of the batch that is on its way
  std::unique_ptr<Communicator> communicator_;
  InFlight in_flight_;
};

std::vector<std::byte> NcclPair::propose() {
  place_.emplace(device_->order, pairing_.id);
  Proposal proposal{place_->proposal(), {}};
  std::size_t bytes = sizeof(proposal.tick);
  if (communicator_ == nullptr) {
    proposal.card = mine_ = device_->card(/*makes_id=*/is_lower());
    bytes = sizeof(proposal);
  }
  const auto* const first = reinterpret_cast<const std::byte*>(&proposal);
  return {first, first + bytes};
}

Task<> NcclPair::launch(std::vector<GpuMessage> batch, std::vector<std::byte> theirs) {
  // The place is left however this ends.
  const struct Leaver {
    std::optional<Place>& place;
    ~Leaver() { place.reset(); }
  } leaver{place_};
  Proposal other{};
  if (theirs.size() != (communicator_ == nullptr ? sizeof(other) : sizeof(other.tick))) {
    throw MismatchError(kMalformedProposal);
  }
  std::memcpy(&other, theirs.data(), theirs.size());
  other.card.end_texts();
  place_->agree(std::max(place_->proposal(), other.tick));
  if (communicator_ == nullptr) co_await connect(other.card);
  Place::Next next(*place_);
  co_await until(next);
  const auto call_of = [](const GpuMessage& message) {
    return std::static_pointer_cast<Call>(message.call);
  };
  {
    const Device::Current current(*device_);
    for (const GpuMessage& message : batch) call_of(message)->begin();
    nccl::launch(*communicator_, batch, is_lower() && !is_alone() ? 1 : 0);
  }
  Communicator::Accepted accepted(*communicator_);
  co_await until(accepted);
  for (GpuMessage& message : batch) {
    call_of(message)->end();
    in_flight_.add(call_of(message), std::move(message.description), message.began,
                   message.timeout_s);
  }
}

Task<> NcclPair::connect(const Card& theirs) {
  const Card& first = is_lower() ? mine_ : theirs;
  const auto [low, high] = std::minmax(pairing_.rank, pairing_.peer);
  std::vector<Card> cards{first};
  if (!is_alone()) cards.push_back(is_lower() ? theirs : mine_);
  const Placement placement =
      Placement::of(pairing_.same_host ? std::vector<std::string>(cards.size())
                                       : std::vector<std::string>{"low", "high"});
  if (const std::string problem = problem_of(cards, placement, {low, high}); !problem.empty()) {
    throw RefusedError("the GPUs of ranks " + std::to_string(low) + " and " + std::to_string(high) +
                       " cannot be connected: " + problem);
  }
  ncclUniqueId id;
  std::memcpy(id.internal, first.unique_id.data(), sizeof(id.internal));
  auto communicator = std::make_unique<Communicator>(device_, id, static_cast<int>(cards.size()),
                                                     is_lower() ? 0 : 1);
  Communicator::Accepted connected(*communicator);
  co_await until(connected);
  communicator_ = std::move(communicator);
}

void NcclPair::poll() {
  if (in_flight()) in_flight_.poll(*communicator_);
}

void NcclPair::abort() {
  if (communicator_ != nullptr) communicator_->abort();
  in_flight_.clear();
  place_.reset();
}

NcclPair::~NcclPair() {
  try {
    drain(*this);
  } catch (const CommError&) {
    abort();
  }
}

}  // namespace

std::unique_ptr<GpuPair> make_nccl_pair(std::shared_ptr<Device> device, const Pairing& pairing) {
  return std::make_unique<NcclPair>(std::move(device), pairing);
}

}  // namespace pycomm::nccl
