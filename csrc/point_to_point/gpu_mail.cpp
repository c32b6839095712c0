#include "point_to_point/gpu_mail.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/fork_guard.h"
#include "nccl/drain.h"

namespace pycomm {

namespace {

/// Waits until a transfer is done.
class Moved final : public Wait {
 public:
  explicit Moved(GpuMail::TransferPtr transfer) : transfer_(std::move(transfer)) {}
  bool poll() override { return transfer_->done; }
  std::string describe() const override {
    const bool sends = transfer_->direction == Transfer::Direction::kSend;
    return "rank " + std::to_string(transfer_->peer) + (sends ? " to take" : " to send") +
           " a piece of it";
  }
  bool rings_doorbell() const override { return false; }

 private:
  const GpuMail::TransferPtr transfer_;
};

}  // namespace

std::shared_ptr<Wait> GpuMail::Mail::send(std::span<const std::byte> bytes) {
  return add(Transfer::Direction::kSend, const_cast<std::byte*>(bytes.data()), bytes.size());
}

std::shared_ptr<Wait> GpuMail::Mail::receive(std::span<std::byte> bytes) {
  return add(Transfer::Direction::kReceive, bytes.data(), bytes.size());
}

std::shared_ptr<Wait> GpuMail::Mail::add(Transfer::Direction direction, std::byte* memory,
                                         std::size_t bytes) {
  auto piece = std::make_shared<Transfer>();
  piece->direction = direction;
  piece->peer = peer_;
  piece->tag = Transfer::kPieceTag;
  piece->count = bytes;
  piece->memory = memory;
  pieces_.push_back(piece);
  return std::make_shared<Moved>(std::move(piece));
}

GpuMail::~GpuMail() {
  if (in_forked_child()) {  // CUDA does not survive a fork
    for (auto& [number, peer] : peers_) static_cast<void>(peer.pair.release());
    return;
  }
  leave([] { return false; });
}

void GpuMail::leave(const std::function<bool()>& given_up) {
  // By rank, which orders all pairs alike everywhere: two ranks never wait for each other's next.
  for (auto& [number, peer] : peers_) {
    try {
      // What is only being launched may have no other half, and then would never end.
      if (gives_up_ || peer.launch != nullptr ||
          (peer.pair != nullptr && !nccl::drain(*peer.pair, given_up))) {
        abort();
        break;
      }
    } catch (const CommError&) {
      abort();
      break;
    }
  }
  gives_up_ = false;
  while (!peers_.empty()) peers_.erase(peers_.begin());
}

void GpuMail::matched(int peer, TransferPtr half) {
  peers_[peer].matched.push_back(std::move(half));
  has_news_ = true;
}

void GpuMail::ordered(int peer, std::vector<TransferPtr> batch, Proposal theirs) {
  Peer& other = peers_[peer];
  other.ordered = std::move(batch);
  other.order = std::move(theirs);
  has_news_ = true;
}

void GpuMail::answered(int peer, Proposal theirs) {
  peers_[peer].answer = std::move(theirs);
  has_news_ = true;
}

bool GpuMail::awaits_answer(int peer) const {
  const auto found = peers_.find(peer);
  if (found == peers_.end()) return false;
  const Peer& other = found->second;
  return !other.batch.empty() && other.launch == nullptr && !other.answer;
}

bool GpuMail::may_be_ordered(int peer) const {
  const auto found = peers_.find(peer);
  return found == peers_.end() || found->second.ordered.empty();
}

// A kBatch's payload is its entries, then the proposal.

std::pair<std::uint64_t, bool> GpuMail::entry(const std::byte* payload, std::uint64_t index) {
  std::uint64_t word;
  std::memcpy(&word, payload + index * sizeof(word), sizeof(word));
  return {word >> 1, (word & 1) != 0};
}

GpuMail::Proposal GpuMail::proposal(const std::byte* payload, const Frame& frame) {
  return {payload + frame.count * sizeof(std::uint64_t), payload + frame.payload_bytes};
}

void GpuMail::propose(int number, Peer& peer) {
  const auto end = peer.matched.begin() +
                   static_cast<std::ptrdiff_t>(std::min(peer.matched.size(), kMostInBatch));
  peer.batch.assign(peer.matched.begin(), end);
  peer.matched.erase(peer.matched.begin(), end);
  const Proposal mine = peer.pair->propose();
  if (number == rank_) {
    peer.answer = mine;
    return;
  }
  Letter letter{number, {}, {}};
  letter.frame.kind = Frame::Kind::kBatch;
  letter.frame.count = peer.batch.size();
  for (const TransferPtr& half : peer.batch) {
    const bool theirs_to_send = half->direction == Transfer::Direction::kReceive;
    const std::uint64_t word = half->id << 1 | (theirs_to_send ? 1 : 0);
    const auto* const bytes = reinterpret_cast<const std::byte*>(&word);
    letter.payload.insert(letter.payload.end(), bytes, bytes + sizeof(word));
  }
  letter.payload.insert(letter.payload.end(), mine.begin(), mine.end());
  letters_.push_back(std::move(letter));
}

void GpuMail::launch(Peer& peer, Proposal theirs) {
  std::vector<nccl::GpuMessage> messages;
  const auto now = Clock::now();
  for (const TransferPtr& half : peer.batch) {
    // A receive into a slot may have been posted long before: the GPU has its time from now on.
    messages.push_back({half->direction == Transfer::Direction::kSend, half->memory, half->bytes(),
                        half->device_call, half->describe() + ", on rank " + std::to_string(rank_),
                        half->in_slot ? now : half->began, half->timeout_s});
  }
  peer.launch = std::make_unique<Launch>(peer.pair->launch(std::move(messages), std::move(theirs)));
}

void GpuMail::end_launch(Peer& peer) {
  const auto over = std::move(peer.launch);
  std::exception_ptr refusal;
  try {
    over->task.take();
  } catch (const nccl::RefusedError&) {
    refusal = std::current_exception();  // at both ends: the group goes on
  }
  for (const TransferPtr& half : peer.batch) {
    half->error = refusal;
    done_.push_back(half);
  }
  peer.batch.clear();
}

bool GpuMail::advance(int number, Peer& peer) {
  if (peer.pair == nullptr) {
    peer.mail = std::make_unique<Mail>(pieces_, number);
    peer.pair = connect_(number, *peer.mail);
  }
  if (peer.pair->in_flight()) peer.pair->poll();
  if (peer.launch != nullptr) {
    if (!peer.launch->task.done()) {
      if (!peer.launch->suspension.wait->poll()) return false;
      peer.launch->suspension.innermost.resume();
    }
    if (peer.launch->task.done()) end_launch(peer);
    return true;
  }
  if (peer.answer) {
    launch(peer, *std::exchange(peer.answer, std::nullopt));
    return true;
  }
  if (peer.batch.empty() && !peer.ordered.empty()) {
    peer.batch = std::exchange(peer.ordered, {});
    Letter letter{number, {}, peer.pair->propose()};
    letter.frame.kind = Frame::Kind::kProposal;
    letters_.push_back(std::move(letter));
    launch(peer, std::move(peer.order));
    return true;
  }
  if (peer.batch.empty() && !peer.matched.empty()) {
    propose(number, peer);
    return true;
  }
  return false;
}

void GpuMail::abort() {
  forget();
  for (auto& [number, peer] : peers_) {
    peer.launch.reset();
    if (peer.pair != nullptr) peer.pair->abort();
  }
}

bool GpuMail::advance() {
  has_news_ = false;
  if (std::exchange(gives_up_, false)) abort();
  bool moved = false;
  for (auto& [number, peer] : peers_) moved |= advance(number, peer);
  return moved;
}

void GpuMail::append_unfinished(std::vector<TransferPtr>& all) const {
  for (const auto& [number, peer] : peers_) {
    all.insert(all.end(), peer.batch.begin(), peer.batch.end());
    all.insert(all.end(), peer.ordered.begin(), peer.ordered.end());
    all.insert(all.end(), peer.matched.begin(), peer.matched.end());
  }
}

std::string GpuMail::describe_launched() const {
  for (const auto& [number, peer] : peers_) {
    if (peer.pair != nullptr && peer.pair->in_flight()) return peer.pair->describe();
  }
  return "";
}

std::string GpuMail::obstacle(const Transfer& transfer) const {
  const auto peer = peers_.find(transfer.peer);
  if (peer == peers_.end()) return "";
  const auto holds = [&](const auto& halves) {
    return std::any_of(halves.begin(), halves.end(),
                       [&](const TransferPtr& half) { return half.get() == &transfer; });
  };
  const auto& [number, state] = *peer;
  if (holds(state.batch)) {
    if (state.launch != nullptr && state.launch->suspension.wait != nullptr) {
      return state.launch->suspension.wait->describe();
    }
    return "rank " + std::to_string(number) + " to agree when to launch it";
  }
  if (holds(state.ordered) || holds(state.matched)) {
    return "the messages before it to be launched";
  }
  return "";
}

bool GpuMail::must_be_polled() const {
  return gives_up_ || std::any_of(peers_.begin(), peers_.end(), [](const auto& entry) {
           const Peer& peer = entry.second;
           return peer.launch != nullptr || (peer.pair != nullptr && peer.pair->in_flight());
         });
}

bool GpuMail::idle() const {
  return !must_be_polled() && std::all_of(peers_.begin(), peers_.end(),
                                          [](const auto& entry) { return entry.second.idle(); });
}

void GpuMail::forget() {
  letters_.clear();
  pieces_.clear();
  for (auto& [number, peer] : peers_) {
    peer.matched.clear();
    peer.ordered.clear();
    peer.batch.clear();
    peer.answer.reset();
  }
}

}  // namespace pycomm
