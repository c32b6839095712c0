#include "point_to_point/courier.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "core/error.h"

namespace pycomm {
namespace {

constexpr std::size_t kParcelBytes = sizeof(Frame) + Courier::kPieceBytes;

}  // namespace

class Courier::RemoteLink : public Link {
 public:
  RemoteLink(Courier& courier, int peer) : courier_(courier), peer_(peer) {}

  bool push(const Frame& frame, std::span<const std::byte> payload) override {
    return courier_.pack(peer_, frame, payload);
  }
  const Frame* front() override {
    return arrived_.empty() ? nullptr
                            : reinterpret_cast<const Frame*>(arrived_.front().memory->data());
  }
  const std::byte* payload() override { return arrived_.front().memory->data() + sizeof(Frame); }
  std::size_t payload_room() override { return arrived_.front().bytes - sizeof(Frame); }
  void pop() override {
    courier_.spare_.push_back(std::move(arrived_.front().memory));
    arrived_.pop_front();
  }
  std::size_t piece_bytes() const override { return kPieceBytes; }
  std::uint64_t address_for_peer(const std::byte*, std::size_t) const override {
    return Frame::kNowhere;
  }
  std::byte* memory_of_peer(std::uint64_t, std::size_t) const override { return nullptr; }
  bool shares_memory() const override { return false; }

  void deliver(Parcel parcel) { arrived_.push_back(std::move(parcel)); }

 private:
  Courier& courier_;
  const int peer_;
  std::deque<Parcel> arrived_;
};

Courier::Courier(Channel& channel, int tag, Allocate allocate, Quarantine quarantine)
    : channel_(channel),
      tag_(tag),
      allocate_(std::move(allocate)),
      quarantine_(std::move(quarantine)) {}

Courier::~Courier() {
  for (Parcel& parcel : sent_) quarantine_(std::move(parcel.memory));
  for (Parcel& parcel : arriving_) quarantine_(std::move(parcel.memory));
}

Link& Courier::link_to(int world_rank) {
  auto& link = links_[world_rank];
  if (!link) link = std::make_unique<RemoteLink>(*this, world_rank);
  return *link;
}

std::shared_ptr<ArenaBlock> Courier::take_memory() {
  if (spare_.empty()) return allocate_(kParcelBytes);
  auto memory = std::move(spare_.back());
  spare_.pop_back();
  return memory;
}

bool Courier::pack(int peer, const Frame& frame, std::span<const std::byte> payload) {
  if (to_peer_[peer] == kMostToOnePeer || packed_.size() + sent_.size() == kMostSent) return false;
  Parcel parcel{peer, sizeof(Frame) + payload.size(), take_memory(), nullptr};
  std::memcpy(parcel.memory->data(), &frame, sizeof(Frame));
  if (!payload.empty()) {
    std::memcpy(parcel.memory->data() + sizeof(Frame), payload.data(), payload.size());
  }
  packed_.push_back(std::move(parcel));
  ++to_peer_[peer];
  return true;
}

bool Courier::poll() {
  bool moved = receive();
  for (; !packed_.empty(); packed_.pop_front()) moved |= post(std::move(packed_.front()));
  for (auto parcel = sent_.begin(); parcel != sent_.end();) {
    if (!is_over(*parcel)) {
      ++parcel;
      continue;
    }
    --to_peer_[parcel->peer];
    if (parcel->message) spare_.push_back(std::move(parcel->memory));
    parcel = sent_.erase(parcel);
    moved = true;
  }
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  return moved;
}

bool Courier::post(Parcel parcel) {
  try {
    parcel.message = channel_.send(parcel.peer, tag_, {parcel.memory->data(), parcel.bytes});
  } catch (...) {
    if (!failure_) failure_ = std::current_exception();
    --to_peer_[parcel.peer];
    spare_.push_back(std::move(parcel.memory));
    return false;
  }
  sent_.push_back(std::move(parcel));
  return true;
}

bool Courier::is_over(Parcel& parcel) {
  if (!parcel.message) return true;
  try {
    return parcel.message->poll();
  } catch (...) {
    if (!failure_) failure_ = std::current_exception();
    parcel.message.reset();
    quarantine_(std::move(parcel.memory));
    return true;
  }
}

bool Courier::receive() {
  bool moved = false;
  while (arriving_.size() < kMostArriving) {
    const auto coming = channel_.probe(tag_);
    if (!coming) break;
    if (coming->bytes < sizeof(Frame) || coming->bytes > kParcelBytes ||
        !links_.contains(coming->peer)) {
      throw MismatchError("rank " + std::to_string(coming->peer) + " sent a malformed frame of " +
                          std::to_string(coming->bytes) +
                          " bytes.\n  All ranks must run the same version of pycomm.");
    }
    Parcel parcel{coming->peer, coming->bytes, take_memory(), nullptr};
    parcel.message = channel_.receive(parcel.peer, tag_, {parcel.memory->data(), parcel.bytes});
    arriving_.push_back(std::move(parcel));
    is_over(arriving_.back());  // takes the message, so that the next probe finds the next one
    moved = true;
  }
  std::set<int> behind;  // peers whose oldest frame is still on its way
  for (auto parcel = arriving_.begin(); parcel != arriving_.end();) {
    if (behind.contains(parcel->peer) || !is_over(*parcel)) {
      behind.insert(parcel->peer);
      ++parcel;
      continue;
    }
    if (parcel->message) links_.at(parcel->peer)->deliver(std::move(*parcel));
    parcel = arriving_.erase(parcel);
    moved = true;
  }
  return moved;
}

}  // namespace pycomm
