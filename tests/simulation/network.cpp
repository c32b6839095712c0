#include "network.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "core/error.h"

namespace simulation {

using pycomm::Channel;
using pycomm::Message;

namespace {

constexpr nanoseconds kNever = nanoseconds::max();
/// How long MPI takes to learn of a death.
constexpr nanoseconds kTold{5'000'000};
/// Of MPI, until a message has left that did not leave at once.
constexpr int kMostCalls = 4;

std::uint64_t checksum(std::span<const std::byte> bytes) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const std::byte byte : bytes) {
    hash = (hash ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3;
  }
  return hash;
}

}  // namespace

/// A message on its way.
struct Network::Parcel {
  int from;
  int to;
  int tag;
  std::span<const std::byte> source;  // of a long one, until it is read
  std::vector<std::byte> bytes;       // of a short one, or once it was read
  std::size_t length;
  std::uint64_t checksum = 0;
  std::uint64_t number = 0;  // by arrival
  bool is_long = false;
  bool sent = false;                 // the sender's memory is free
  bool withdrawn = false;            // its sender has given up
  int calls_to_go = 0;               // of its sender, before it leaves
  std::shared_ptr<Receive> receive;  // that has asked for it
};

struct Network::Receive {
  int peer;
  int rank;
  int tag;
  std::span<std::byte> room;
  std::size_t* length;
  std::shared_ptr<Parcel> parcel = nullptr;  // that it takes
  bool written = false;
};

namespace {

std::string awaited(const char* verb, int peer, std::size_t bytes, int tag) {
  return "rank " + std::to_string(peer) + " to " + verb + " " + std::to_string(bytes) +
         " bytes (tag " + std::to_string(tag) + ")";
}

[[noreturn]] void throw_lost(int rank, const std::string& what) {
  throw pycomm::PeerLostError(std::string(pycomm::Channel::kFailure) + " while rank " +
                              std::to_string(rank) + " waited for " + what +
                              ": the peer is gone: process failed");
}

}  // namespace

class SimulatedSend : public Message {
 public:
  SimulatedSend(Network& network, std::shared_ptr<Network::Parcel> parcel)
      : network_(network), parcel_(std::move(parcel)) {}
  ~SimulatedSend() override { parcel_->withdrawn = !done_; }
  SimulatedSend(const SimulatedSend&) = delete;
  SimulatedSend& operator=(const SimulatedSend&) = delete;

  bool poll() override {
    if (done_) return true;
    network_.call(parcel_->from);
    done_ = parcel_->sent;
    if (!done_ && network_.told_of(parcel_->from, parcel_->to)) {
      throw_lost(parcel_->from, describe());
    }
    return done_;
  }
  std::string describe() const override {
    return awaited("take", parcel_->to, parcel_->length, parcel_->tag);
  }

 private:
  Network& network_;
  std::shared_ptr<Network::Parcel> parcel_;
  bool done_ = false;
};

class SimulatedReceive : public Message {
 public:
  SimulatedReceive(Network& network, std::shared_ptr<Network::Receive> receive)
      : network_(network), receive_(std::move(receive)) {
    network_.await(receive_);
  }
  ~SimulatedReceive() override {
    auto& mine = network_.waiting_[static_cast<std::size_t>(receive_->rank)];
    const auto lane = mine.find({receive_->peer, receive_->rank, receive_->tag});
    if (lane != mine.end()) std::erase(lane->second, receive_);
  }
  SimulatedReceive(const SimulatedReceive&) = delete;
  SimulatedReceive& operator=(const SimulatedReceive&) = delete;

  bool poll() override {
    if (done_) return true;
    network_.call(receive_->rank);
    if (receive_->parcel == nullptr) {
      if (network_.told_of(receive_->rank, receive_->peer)) {
        throw_lost(receive_->rank, describe());
      }
      return false;
    }
    const std::size_t length = receive_->parcel->length;
    const bool fits = receive_->length != nullptr ? length <= receive_->room.size()
                                                  : length == receive_->room.size();
    if (!fits) {
      throw pycomm::MismatchError("rank " + std::to_string(receive_->rank) + " expected " +
                                  std::to_string(receive_->room.size()) + " bytes from rank " +
                                  std::to_string(receive_->peer) + ", which sent " +
                                  std::to_string(length) + ".");
    }
    done_ = receive_->written;
    if (done_ && receive_->length != nullptr) *receive_->length = length;
    if (!done_ && network_.told_of(receive_->rank, receive_->peer)) {
      throw_lost(receive_->rank, describe());
    }
    return done_;
  }
  std::string describe() const override {
    return awaited("send", receive_->peer, receive_->room.size(), receive_->tag);
  }

 private:
  Network& network_;
  std::shared_ptr<Network::Receive> receive_;
  bool done_ = false;
};

class SimulatedChannel : public Channel {
 public:
  SimulatedChannel(Network& network, int rank, int size)
      : network_(network), rank_(rank), size_(size) {}

  int rank() const override { return rank_; }
  int size() const override { return size_; }

  std::unique_ptr<Message> send(int peer, int tag, std::span<const std::byte> bytes) override {
    network_.call(rank_);
    return std::make_unique<SimulatedSend>(network_, network_.post(rank_, peer, tag, bytes));
  }
  std::unique_ptr<Message> receive(int peer, int tag, std::span<std::byte> bytes) override {
    return post(peer, tag, bytes, nullptr);
  }
  std::unique_ptr<Message> receive_at_most(int peer, int tag, std::span<std::byte> room,
                                           std::size_t& length) override {
    return post(peer, tag, room, &length);
  }
  void progress() override { network_.call(rank_); }

  std::optional<Incoming> probe(int tag) override {
    network_.call(rank_);
    std::optional<Incoming> found;
    std::uint64_t earliest = ~std::uint64_t{0};
    for (int peer = 0; peer < size_; ++peer) {
      const auto lane = network_.arrived_.find({peer, rank_, tag});
      if (lane == network_.arrived_.end() || lane->second.empty()) continue;
      const auto& first = *lane->second.front();
      if (first.number >= earliest) continue;
      earliest = first.number;
      found = {peer, first.length};
    }
    return found;
  }

 private:
  std::unique_ptr<Message> post(int peer, int tag, std::span<std::byte> room, std::size_t* length) {
    return std::make_unique<SimulatedReceive>(
        network_, std::make_shared<Network::Receive>(
                      Network::Receive{peer, rank_, tag, room, length, nullptr, false}));
  }

  Network& network_;
  const int rank_;
  const int size_;
};

Network::Network(Machine& machine, int ranks, std::uint64_t seed, const Weather& weather)
    : machine_(machine),
      random_(seed),
      weather_(weather),
      users_(static_cast<std::size_t>(ranks), -1),
      died_(static_cast<std::size_t>(ranks), kNever),
      cut_(static_cast<std::size_t>(ranks)),
      finalized_(static_cast<std::size_t>(ranks)),
      waiting_(static_cast<std::size_t>(ranks)),
      held_(static_cast<std::size_t>(ranks)),
      asked_(static_cast<std::size_t>(ranks)) {}

Network::~Network() = default;

std::vector<std::shared_ptr<Channel>> Network::channels() {
  const auto size = static_cast<int>(died_.size());
  std::vector<std::shared_ptr<Channel>> channels;
  for (int rank = 0; rank < size; ++rank) {
    channels.push_back(std::make_shared<SimulatedChannel>(*this, rank, size));
  }
  return channels;
}

nanoseconds Network::latency() {
  return weather_.latency + nanoseconds(random_.below(
                                weather_.latency.count() * static_cast<long>(weather_.spread) + 1));
}

void Network::at(nanoseconds when, std::function<void()> event) {
  events_.push({when, event_number_++, std::move(event)});
}

nanoseconds Network::next_event() const { return events_.empty() ? kNever : events_.top().when; }

void Network::do_events() {
  while (!events_.empty() && events_.top().when <= machine_.now()) {
    const auto run = events_.top().run;
    events_.pop();
    run();
    machine_.note_progress();
  }
}

bool Network::passes(int from, int to) const {
  return !cut_[static_cast<std::size_t>(from)] && !cut_[static_cast<std::size_t>(to)];
}

bool Network::told_of(int rank, int peer) const {
  const nanoseconds died = died_[static_cast<std::size_t>(peer)];
  return weather_.tells_of_deaths && passes(peer, rank) && died != kNever &&
         machine_.now() > died + kTold;
}

std::shared_ptr<Network::Parcel> Network::post(int from, int to, int tag,
                                               std::span<const std::byte> bytes) {
  auto parcel = std::make_shared<Parcel>();
  parcel->from = from;
  parcel->to = to;
  parcel->tag = tag;
  parcel->length = bytes.size();
  ++messages_;
  if (bytes.size() > weather_.eager_bytes) {
    parcel->is_long = true;
    parcel->source = bytes;
    parcel->checksum = checksum(bytes);
  } else {
    parcel->bytes.assign(bytes.begin(), bytes.end());
    parcel->sent = true;
  }
  auto& held = held_[static_cast<std::size_t>(from)];
  if (!held.empty() || random_.chance(weather_.held)) {
    parcel->calls_to_go = random_.between(1, kMostCalls);
    held.push_back(parcel);
  } else {
    depart(parcel);
  }
  return parcel;
}

void Network::depart(const std::shared_ptr<Parcel>& parcel) {
  if (!passes(parcel->from, parcel->to)) return;
  const Lane lane{parcel->from, parcel->to, parcel->tag};
  auto& last = last_arrival_[lane];
  last = std::max(last + nanoseconds(1), machine_.now() + latency());
  at(last, [this, lane, parcel] {
    if (!passes(parcel->from, parcel->to)) return;
    parcel->number = ++arrivals_;
    arrived_[lane].push_back(parcel);
  });
}

void Network::await(const std::shared_ptr<Receive>& receive) {
  auto& mine = waiting_[static_cast<std::size_t>(receive->rank)];
  mine[{receive->peer, receive->rank, receive->tag}].push_back(receive);
}

void Network::write(Receive& receive) {
  const auto& bytes = receive.parcel->bytes;
  const std::size_t fitting = std::min(bytes.size(), receive.room.size());
  if (fitting > 0) std::memcpy(receive.room.data(), bytes.data(), fitting);
  receive.written = true;
}

void Network::move_sends(int rank) {
  const auto me = static_cast<std::size_t>(rank);
  for (const auto& parcel : held_[me]) --parcel->calls_to_go;
  while (!held_[me].empty() && (finalized_[me] || held_[me].front()->calls_to_go <= 0)) {
    depart(held_[me].front());
    held_[me].pop_front();
  }
  while (!asked_[me].empty()) {
    const auto parcel = asked_[me].front();
    asked_[me].pop_front();
    if (!parcel->withdrawn && checksum(parcel->source) != parcel->checksum) {
      misuse_ = "rank " + std::to_string(rank) + " changed a message of " +
                std::to_string(parcel->length) + " bytes while it was being sent";
    }
    parcel->bytes.assign(parcel->source.begin(), parcel->source.end());
    parcel->sent = true;
    at(machine_.now() + latency(), [this, parcel] {
      if (passes(parcel->from, parcel->to)) write(*parcel->receive);
    });
  }
}

void Network::call(int rank) {
  const auto me = static_cast<std::size_t>(rank);
  const auto caller = machine_.running();
  if (users_[me] < 0) users_[me] = caller;
  if (users_[me] != caller) misuse_ = "two threads of rank " + std::to_string(rank) + " call MPI";
  machine_.interleave();
  move_sends(rank);
  for (auto lane = waiting_[me].begin(); lane != waiting_[me].end();) {
    auto& receives = lane->second;
    auto& arrived = arrived_[lane->first];
    while (!receives.empty() && !arrived.empty()) {
      const auto receive = receives.front();
      const auto parcel = arrived.front();
      receives.pop_front();
      arrived.pop_front();
      receive->parcel = parcel;
      parcel->receive = receive;
      // From now on the memory is the network's.
      const std::size_t fitting = std::min(parcel->length, receive->room.size());
      if (fitting > 0) std::memset(receive->room.data(), 0xa5, fitting);
      if (!parcel->is_long) {
        write(*receive);
      } else {
        at(machine_.now() + latency(), [this, parcel] {
          if (!passes(parcel->from, parcel->to)) return;
          asked_[static_cast<std::size_t>(parcel->from)].push_back(parcel);
          if (finalized_[static_cast<std::size_t>(parcel->from)]) move_sends(parcel->from);
        });
      }
    }
    lane = receives.empty() ? waiting_[me].erase(lane) : std::next(lane);
  }
}

void Network::kill(int rank) {
  died_[static_cast<std::size_t>(rank)] = machine_.now();
  held_[static_cast<std::size_t>(rank)].clear();
}

void Network::cut(const std::vector<int>& ranks) {
  for (const int rank : ranks) cut_[static_cast<std::size_t>(rank)] = true;
}

void Network::finalize(int rank) {
  finalized_[static_cast<std::size_t>(rank)] = true;
  move_sends(rank);
}

}  // namespace simulation
