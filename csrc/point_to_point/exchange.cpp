#include "point_to_point/exchange.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "core/error.h"
#include "core/pause.h"

namespace pycomm {
namespace {

/// In pieces: from the size of a core's cache on, memcpy stops using the processor's own copy loop
/// (rep movsb), which does not fetch the lines that it overwrites: 1 MiB then takes 19 us, not 16.
void copy_bytes(std::byte* target, const std::byte* source, std::size_t bytes) {
  constexpr std::size_t kPieceBytes = 64 << 10;
  for (std::size_t done = 0; done < bytes; done += kPieceBytes) {
    std::memcpy(target + done, source + done, std::min(kPieceBytes, bytes - done));
  }
}

// What is wrong with a frame.
constexpr const char* kUnknownMessage = "it names a message that there is not";
constexpr const char* kNotItsMemory = "its address is not in that rank's memory";

}  // namespace

Exchange::Exchange(int rank, std::vector<Link*> links, GpuMail::Connect connect)
    : rank_(rank), gpus_(rank, std::move(connect)) {
  for (Link* link : links) peers_.push_back(Peer{.link = link});
}

void Exchange::post(TransferPtr transfer) {
  transfer->id = next_id_++;
  if (transfer->direction == Transfer::Direction::kSend) {
    at(transfer->peer).outbox.push_back({transfer->frame(Frame::Kind::kMessage), transfer});
    return;
  }
  const auto message = std::find_if(
      unexpected_.begin(), unexpected_.end(),
      [&](const Arrived& arrived) { return transfer->accepts(arrived.peer, arrived.frame.tag); });
  if (message == unexpected_.end()) {
    if (transfer->in_slot) advertise(transfer);
    posted_.push_back(std::move(transfer));
    return;
  }
  const Arrived arrived = std::move(*message);
  unexpected_.erase(message);
  fulfil(transfer, arrived.peer, arrived.frame, arrived.payload.data());
}

void Exchange::advertise(const TransferPtr& receive) {
  if (receive->device >= 0) return;
  Peer& peer = at(receive->peer);
  Frame ready = receive->frame(Frame::Kind::kReady);
  ready.address = peer.link->address_for_peer(receive->memory, receive->bytes());
  if (ready.address != Frame::kNowhere) peer.outbox.push_back({ready, nullptr});
}

void Exchange::take_ready(Peer& peer, const Frame& frame) {
  const auto announced = std::find_if(peer.sends.begin(), peer.sends.end(), [&](const auto& entry) {
    const Transfer& send = *entry.second;
    return send.in_slot && !send.met && send.tag == frame.tag;
  });
  if (announced != peer.sends.end()) {
    announced->second->met = true;
  } else {
    peer.ready[frame.tag].push_back(frame);
  }
}

std::optional<Frame> Exchange::ready_for(Peer& peer, const Transfer& send) {
  const auto waiting = peer.ready.find(send.tag);
  if (!send.in_slot || waiting == peer.ready.end()) return std::nullopt;
  const Frame slot = waiting->second.front();
  waiting->second.pop_front();
  if (waiting->second.empty()) peer.ready.erase(waiting);
  return slot;
}

bool Exchange::send_at_once(const Transfer& transfer) {
  Peer& peer = at(transfer.peer);
  if (transfer.device >= 0 || transfer.in_slot || transfer.bytes() > Frame::kEagerBytes ||
      peer.eager_messages == Frame::kEagerMessages || !peer.outbox.empty()) {
    return false;
  }
  Frame frame = transfer.frame(Frame::Kind::kMessage);
  frame.id = next_id_;
  frame.eager = true;
  frame.payload_bytes = transfer.bytes();
  if (!peer.link->push(frame, {transfer.memory, transfer.bytes()})) return false;
  ++next_id_;
  ++peer.eager_messages;
  return true;
}

bool Exchange::receive_at_once(const Transfer& transfer, int looks) {
  // Whatever came or was posted before has its turn first.
  if (transfer.in_slot || !posted_.empty() || !unexpected_.empty()) return false;
  Peer& peer = at(transfer.peer);
  for (int look = 0; look < looks; ++look) {
    const Frame* const frame = peer.link->front();
    if (frame == nullptr) {
      pause();
    } else if (frame->kind == Frame::Kind::kCredit) {
      take_in(transfer.peer, *frame, nullptr);
      peer.link->pop();
    } else if (frame->kind == Frame::Kind::kMessage && frame->eager && frame->tag == transfer.tag &&
               frame->payload_bytes == transfer.bytes() &&
               transfer.frame(Frame::Kind::kMessage).same_elements(*frame)) {
      take_eager(peer, transfer.memory, peer.link->payload(), transfer.bytes());
      peer.link->pop();
      push_outbox(peer);
      return true;
    } else {
      return false;
    }
  }
  return false;
}

bool Exchange::advance() {
  bool moved = false;
  for (std::size_t i = 0; i < peers_.size(); ++i) {
    Peer& peer = peers_[i];
    while (const Frame* frame = peer.link->front()) {
      take_in(static_cast<int>(i), *frame, peer.link->payload());
      peer.link->pop();
      moved = true;
    }
    std::size_t budget = kCopyBytes;
    moved |= read_on(peer, budget);
    moved |= push_outbox(peer);
    moved |= write_on(peer, budget);
    moved |= push_streams(peer);
  }
  return moved;
}

void Exchange::malformed(int from, const char* problem) const {
  throw MismatchError("rank " + std::to_string(rank_) + " got a malformed frame from rank " +
                      std::to_string(from) + ": " + problem +
                      ".\n  All ranks must run the same version of pycomm. If they do, something "
                      "has overwritten pycomm's memory on that rank: read its log first.");
}

Exchange::TransferPtr Exchange::take(Transfers& transfers, std::uint64_t id, int from) const {
  auto found = transfers.extract(id);
  if (found.empty()) malformed(from, kUnknownMessage);
  return std::move(found.mapped());
}

std::byte* Exchange::memory_of(int from, std::uint64_t address, std::size_t bytes) {
  std::byte* const memory = at(from).link->memory_of_peer(address, bytes);
  if (memory == nullptr) malformed(from, kNotItsMemory);
  return memory;
}

void Exchange::take_in(int from, const Frame& frame, const std::byte* payload) {
  Peer& peer = at(from);
  if (const char* const problem =
          Frame::problem(reinterpret_cast<const std::byte*>(&frame), peer.link->payload_room())) {
    malformed(from, problem);
  }
  switch (frame.kind) {
    case Frame::Kind::kMessage: {
      const auto receive = std::find_if(posted_.begin(), posted_.end(), [&](const auto& posted) {
        return posted->accepts(from, frame.tag);
      });
      if (receive == posted_.end()) {
        unexpected_.push_back({from, frame, {payload, payload + frame.payload_bytes}});
      } else {
        const TransferPtr matched = std::move(*receive);
        posted_.erase(receive);
        fulfil(matched, from, frame, payload);
      }
      return;
    }
    case Frame::Kind::kRequest: {
      const auto found = peer.sends.find(frame.id);
      if (found == peer.sends.end()) malformed(from, kUnknownMessage);
      std::byte* const target = frame.address == Frame::kNowhere
                                    ? nullptr
                                    : memory_of(from, frame.address, found->second->bytes());
      const TransferPtr send = take(peer.sends, frame.id, from);
      if (send->device >= 0) {
        gpus_.matched(from, send);
      } else if (target != nullptr) {
        peer.writings.push_back({send, target, send->frame(Frame::Kind::kWritten)});
      } else {
        peer.streams.push_back(send);
      }
      return;
    }
    case Frame::Kind::kData: {
      const auto found = peer.receives.find(frame.id);
      if (found == peer.receives.end()) malformed(from, kUnknownMessage);
      const TransferPtr receive = found->second;
      if (frame.payload_bytes > receive->bytes() - receive->moved_bytes) {
        malformed(from, "it brings more than its message has");
      }
      copy_bytes(receive->memory + receive->moved_bytes, payload, frame.payload_bytes);
      receive->moved_bytes += frame.payload_bytes;
      if (receive->moved_bytes < receive->bytes()) return;
      peer.receives.erase(found);
      finish(receive);
      return;
    }
    case Frame::Kind::kWritten:
      finish(take(peer.receives, frame.id, from));
      return;
    case Frame::Kind::kReady:
      memory_of(from, frame.address, frame.bytes());
      return take_ready(peer, frame);
    case Frame::Kind::kPlaced: {
      const auto receive = std::find_if(posted_.begin(), posted_.end(), [&](const auto& posted) {
        return posted->id == frame.id && posted->peer == from && posted->in_slot;
      });
      if (receive == posted_.end()) malformed(from, kUnknownMessage);
      if (!(*receive)->takes(frame)) malformed(from, "it is not what its slot was made for");
      const TransferPtr placed = std::move(*receive);
      posted_.erase(receive);
      placed->got(from, frame);
      finish(placed);
      return;
    }
    case Frame::Kind::kReceived:
      finish(take(peer.sends, frame.id, from));
      return;
    case Frame::Kind::kRefused:
      throw MismatchError(std::string(reinterpret_cast<const char*>(payload), frame.payload_bytes));
    case Frame::Kind::kCredit:
      if (frame.count > peer.eager_messages) malformed(from, "it gives credit for nothing");
      peer.eager_messages -= frame.count;
      return;
    case Frame::Kind::kBatch:
      return take_batch(from, frame, payload);
    case Frame::Kind::kProposal:
      if (!gpus_.awaits_answer(from)) malformed(from, "it answers nothing");
      return gpus_.answered(from, {payload, payload + frame.payload_bytes});
  }
}

void Exchange::fulfil(const TransferPtr& receive, int from, const Frame& frame,
                      const std::byte* payload) {
  if (!receive->takes(frame)) {
    posted_.push_front(receive);  // not done: it ends with what is thrown here
    refuse(*receive, from, frame);
  }
  Peer& peer = at(from);
  const bool lies_there = !frame.on_gpu && !frame.eager && frame.address != Frame::kNowhere;
  const std::byte* const source =
      lies_there ? peer.link->memory_of_peer(frame.address, receive->bytes()) : nullptr;
  const bool is_second = !frame.eager && peer.receives.contains(frame.id);
  if (is_second || (lies_there && source == nullptr)) {
    posted_.push_front(receive);
    malformed(from, is_second ? "it names a message that is under way already" : kNotItsMemory);
  }
  receive->got(from, frame);
  receive->id = frame.id;
  if (frame.on_gpu && rank_ <= from) {
    if (from == rank_) gpus_.matched(from, take(peer.sends, frame.id, from));
    gpus_.matched(from, receive);
  } else if (frame.eager) {
    take_eager(peer, receive->memory, payload, frame.payload_bytes);
    finish(receive);
  } else if (lies_there) {
    peer.readings.push_back({receive, source});
  } else {
    peer.receives[frame.id] = receive;
    Frame request = receive->frame(Frame::Kind::kRequest);
    if (receive->slot) {
      request.address = peer.link->address_for_peer(receive->memory, receive->bytes());
    }
    peer.outbox.push_back({request, nullptr});
  }
}

void Exchange::take_batch(int from, const Frame& frame, const std::byte* payload) {
  if (!gpus_.may_be_ordered(from)) malformed(from, "its last batch is not under way yet");
  Peer& peer = at(from);
  std::vector<TransferPtr> batch;
  for (std::uint64_t i = 0; i < frame.count; ++i) {
    const auto [id, mine_to_send] = GpuMail::entry(payload, i);
    Transfers& transfers = mine_to_send ? peer.sends : peer.receives;
    if (!transfers.contains(id)) {
      posted_.insert(posted_.end(), batch.begin(), batch.end());  // they end with what is thrown
      malformed(from, kUnknownMessage);
    }
    batch.push_back(take(transfers, id, from));
  }
  gpus_.ordered(from, std::move(batch), GpuMail::proposal(payload, frame));
}

void Exchange::take_eager(Peer& peer, std::byte* target, const std::byte* payload,
                          std::size_t bytes) {
  copy_bytes(target, payload, bytes);
  // Told now and then: each time would double the number of frames.
  if (++peer.eager_consumed < Frame::kEagerMessages / 4) return;
  Frame credit;
  credit.kind = Frame::Kind::kCredit;
  credit.count = std::exchange(peer.eager_consumed, 0);
  peer.outbox.push_back({credit, nullptr});
}

bool Exchange::write_on(Peer& peer, std::size_t& budget) {
  bool moved = false;
  for (; !peer.writings.empty(); peer.writings.pop_front()) {
    const auto& [send, target, over] = peer.writings.front();
    const std::size_t bytes = std::min(budget, send->bytes() - send->moved_bytes);
    copy_bytes(target + send->moved_bytes, send->memory + send->moved_bytes, bytes);
    send->moved_bytes += bytes;
    budget -= bytes;
    moved |= bytes > 0;
    if (send->moved_bytes < send->bytes() || !peer.link->push(over, {})) return moved;
    moved = true;
    finish(send);
  }
  return moved;
}

bool Exchange::read_on(Peer& peer, std::size_t& budget) {
  if (peer.readings.empty()) return false;
  while (!peer.readings.empty()) {
    const Reading& reading = peer.readings.front();
    Transfer& receive = *reading.receive;
    const std::size_t bytes = std::min(budget, receive.bytes() - receive.moved_bytes);
    copy_bytes(receive.memory + receive.moved_bytes, reading.source + receive.moved_bytes, bytes);
    receive.moved_bytes += bytes;
    budget -= bytes;
    if (receive.moved_bytes < receive.bytes()) break;
    peer.outbox.push_back({receive.frame(Frame::Kind::kReceived), nullptr});
    receive.read_there = true;
    finish(reading.receive);
    peer.readings.pop_front();
  }
  return true;
}

void Exchange::refuse(const Transfer& receive, int from, const Frame& frame) {
  std::string text = receive.describe() + ", on rank " + std::to_string(rank_) +
                     ": it got another message. Rank " + std::to_string(from) + " sent " +
                     frame.elements() + " with tag " + std::to_string(frame.tag) + ", rank " +
                     std::to_string(rank_) + " receives " +
                     receive.frame(Frame::Kind::kMessage).elements() + ".\n  " +
                     (frame.on_gpu != (receive.device >= 0)
                          ? "A message has its tensors on GPUs at both ends, or at none: pass "
                            "t.cuda(), or t.cpu(), at both."
                          : "Both calls must have the same shape and dtype; messages of one sender "
                            "and tag are received in the order they were sent.");
  text.resize(std::min(text.size(), Frame::kEagerBytes));
  Frame refused = receive.frame(Frame::Kind::kRefused);
  refused.payload_bytes = text.size();
  // A rank of this host reads it in the group's notice as well, should there be no room.
  at(from).link->push(refused, std::as_bytes(std::span(text)));
  throw MismatchError(text);
}

bool Exchange::push_outbox(Peer& peer) {
  bool moved = false;
  for (; !peer.outbox.empty(); peer.outbox.pop_front()) {
    auto& [frame, send, more] = peer.outbox.front();
    std::span<const std::byte> payload = more;
    // What goes to a slot must not overtake what is being written to the one before.
    if (send && send->in_slot && !peer.writings.empty()) return moved;
    if (send && send->device < 0) {
      const auto slot = ready_for(peer, *send);
      if (slot && send->bytes() <= slot->bytes()) {
        Frame placed = send->frame(Frame::Kind::kPlaced);
        placed.id = slot->id;
        peer.writings.push_back(
            {send, peer.link->memory_of_peer(slot->address, slot->bytes()), placed});
        moved = true;
        continue;
      }
      send->met |= slot.has_value();  // too small: they meet at the receiver, which refuses
      frame.eager = send->bytes() <= Frame::kEagerBytes &&
                    peer.eager_messages < Frame::kEagerMessages &&
                    !(send->in_slot && peer.link->shares_memory());
      if (frame.eager) {
        payload = {send->memory, send->bytes()};
      } else {
        frame.address = peer.link->address_for_peer(send->memory, send->bytes());
      }
    }
    frame.payload_bytes = payload.size();
    if (!peer.link->push(frame, payload)) return moved;
    moved = true;
    if (!send) continue;
    if (frame.eager) {
      ++peer.eager_messages;
      finish(send);
    } else {
      peer.sends[send->id] = send;
    }
  }
  return moved;
}

bool Exchange::advance_gpus() {
  const bool moved = gpus_.advance();
  for (auto& [to, frame, payload] : gpus_.take_letters()) {
    at(to).outbox.push_back({frame, nullptr, std::move(payload)});
    push_outbox(at(to));
  }
  for (TransferPtr& piece : gpus_.take_pieces()) post(std::move(piece));
  return moved;
}

bool Exchange::push_streams(Peer& peer) {
  bool moved = false;
  while (!peer.streams.empty()) {
    const TransferPtr send = peer.streams.front();
    const std::size_t piece =
        std::min(peer.link->piece_bytes(), std::max(kLeastPieceBytes, send->bytes() / kPieces));
    do {
      Frame data;
      data.kind = Frame::Kind::kData;
      data.id = send->id;
      data.payload_bytes = std::min(piece, send->bytes() - send->moved_bytes);
      if (!peer.link->push(data, {send->memory + send->moved_bytes, data.payload_bytes})) {
        return moved;
      }
      send->moved_bytes += data.payload_bytes;
      moved = true;
    } while (send->moved_bytes < send->bytes());
    peer.streams.pop_front();
    finish(send);
  }
  return moved;
}

void Exchange::finish(const TransferPtr& transfer) {
  transfer->done = true;
  if (!transfer->is_piece()) done_.push_back(transfer);
}

std::vector<std::shared_ptr<Transfer>> Exchange::take_done() {
  for (const TransferPtr& transfer : gpus_.take_done()) finish(transfer);
  return std::exchange(done_, {});
}

std::vector<std::shared_ptr<Transfer>> Exchange::unfinished() const {
  std::vector<TransferPtr> all(posted_.begin(), posted_.end());
  for (const Peer& peer : peers_) {
    for (const Outgoing& outgoing : peer.outbox) {
      if (outgoing.send) all.push_back(outgoing.send);
    }
    all.insert(all.end(), peer.streams.begin(), peer.streams.end());
    for (const auto& [id, send] : peer.sends) all.push_back(send);
    for (const auto& [id, receive] : peer.receives) all.push_back(receive);
    for (const Reading& reading : peer.readings) all.push_back(reading.receive);
    for (const Writing& writing : peer.writings) all.push_back(writing.send);
  }
  std::erase_if(all, [](const TransferPtr& transfer) { return transfer->is_piece(); });
  gpus_.append_unfinished(all);
  return all;
}

bool Exchange::is_left_to_sender(const Transfer& transfer) const {
  return transfer.slot && !transfer.done &&
         peers_[static_cast<std::size_t>(transfer.peer)].link->shares_memory();
}

bool Exchange::idle() const {
  const auto left = [this](const auto& receive) { return is_left_to_sender(*receive); };
  return std::all_of(posted_.begin(), posted_.end(), left) && gpus_.idle() &&
         std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
           return peer.outbox.empty() && peer.streams.empty() && peer.sends.empty() &&
                  peer.receives.empty() && peer.readings.empty() && peer.writings.empty();
         });
}

bool Exchange::has_unsent() const {
  return std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
    return !peer.outbox.empty() || !peer.streams.empty() || !peer.writings.empty();
  });
}

void Exchange::clear() {
  posted_.clear();
  unexpected_.clear();
  done_.clear();
  for (Peer& peer : peers_) peer = Peer{.link = peer.link};
  gpus_.forget();
}

}  // namespace pycomm
