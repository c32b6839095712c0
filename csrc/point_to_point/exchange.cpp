#include "point_to_point/exchange.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "core/error.h"
#include "core/pause.h"

namespace pycomm {
namespace {

/// An empty tensor may have no address, which memcpy does not allow.
void copy(std::byte* target, const std::byte* source, std::size_t bytes) {
  if (bytes > 0) std::memcpy(target, source, bytes);
}

}  // namespace

Exchange::Exchange(int rank, std::vector<Link*> links, GpuMail::Connect connect)
    : rank_(rank), gpus_(rank, std::move(connect)) {
  for (Link* link : links) peers_.push_back({link, {}, {}, {}, {}, {}, 0, 0});
}

void Exchange::post(TransferPtr transfer) {
  if (transfer->direction == Transfer::Direction::kSend) {
    transfer->id = next_id_++;
    at(transfer->peer).outbox.push_back({transfer->frame(Frame::Kind::kMessage), transfer});
    return;
  }
  const auto message = std::find_if(
      unexpected_.begin(), unexpected_.end(),
      [&](const Arrived& arrived) { return transfer->accepts(arrived.peer, arrived.frame.tag); });
  if (message == unexpected_.end()) {
    posted_.push_back(std::move(transfer));
    return;
  }
  const Arrived arrived = std::move(*message);
  unexpected_.erase(message);
  fulfil(transfer, arrived.peer, arrived.frame, arrived.payload.data());
}

bool Exchange::send_at_once(const Transfer& transfer) {
  Peer& peer = at(transfer.peer);
  if (transfer.device >= 0 || transfer.bytes() > Frame::kEagerBytes ||
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
  if (!posted_.empty() || !unexpected_.empty()) return false;
  Peer& peer = at(transfer.peer);
  for (int look = 0; look < looks; ++look) {
    const Frame* const frame = peer.link->front();
    if (frame == nullptr) {
      pause();
    } else if (frame->kind == Frame::Kind::kCredit) {
      take_in(transfer.peer, *frame, nullptr);
      peer.link->pop();
    } else if (frame->kind == Frame::Kind::kMessage && frame->eager && frame->tag == transfer.tag &&
               transfer.frame(Frame::Kind::kMessage).same_elements(*frame)) {
      take_eager(peer, transfer.memory, peer.link->payload(), frame->payload_bytes);
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
    moved |= read_on(peer);
    moved |= push_outbox(peer);
    moved |= push_streams(peer);
  }
  return moved;
}

void Exchange::take_in(int from, const Frame& frame, const std::byte* payload) {
  Peer& peer = at(from);
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
      const TransferPtr send = peer.sends.extract(frame.id).mapped();
      if (send->device >= 0) {
        gpus_.matched(from, send);
      } else {
        peer.streams.push_back(send);
      }
      return;
    }
    case Frame::Kind::kData: {
      const TransferPtr receive = peer.receives.at(frame.id);
      copy(receive->memory + receive->moved_bytes, payload, frame.payload_bytes);
      receive->moved_bytes += frame.payload_bytes;
      if (receive->moved_bytes < receive->bytes()) return;
      peer.receives.erase(frame.id);
      finish(receive);
      return;
    }
    case Frame::Kind::kReceived:
      finish(peer.sends.extract(frame.id).mapped());
      return;
    case Frame::Kind::kRefused:
      throw MismatchError(std::string(reinterpret_cast<const char*>(payload), frame.payload_bytes));
    case Frame::Kind::kCredit:
      peer.eager_messages -= frame.count;
      return;
    case Frame::Kind::kBatch:
      return take_batch(from, frame, payload);
    case Frame::Kind::kProposal:
      return gpus_.answered(from, {payload, payload + frame.payload_bytes});
  }
}

void Exchange::fulfil(const TransferPtr& receive, int from, const Frame& frame,
                      const std::byte* payload) {
  if (!receive->frame(Frame::Kind::kMessage).same_elements(frame)) {
    posted_.push_front(receive);  // not done: it ends with what is thrown here
    refuse(*receive, from, frame);
  }
  Peer& peer = at(from);
  receive->peer = from;
  receive->id = frame.id;
  if (frame.on_gpu && rank_ <= from) {
    if (from == rank_) gpus_.matched(from, peer.sends.extract(frame.id).mapped());
    gpus_.matched(from, receive);
  } else if (frame.eager) {
    take_eager(peer, receive->memory, payload, frame.payload_bytes);
    finish(receive);
  } else if (frame.address != Frame::kNowhere) {
    peer.readings.push_back({receive, peer.link->memory_of_peer(frame.address)});
  } else {
    peer.receives[frame.id] = receive;
    peer.outbox.push_back({receive->frame(Frame::Kind::kRequest), nullptr});
  }
}

void Exchange::take_batch(int from, const Frame& frame, const std::byte* payload) {
  Peer& peer = at(from);
  std::vector<TransferPtr> batch;
  for (std::uint64_t i = 0; i < frame.count; ++i) {
    const auto [id, mine_to_send] = GpuMail::entry(payload, i);
    batch.push_back((mine_to_send ? peer.sends : peer.receives).extract(id).mapped());
  }
  gpus_.ordered(from, std::move(batch), GpuMail::proposal(payload, frame));
}

void Exchange::take_eager(Peer& peer, std::byte* target, const std::byte* payload,
                          std::size_t bytes) {
  copy(target, payload, bytes);
  // Told now and then: each time would double the number of frames.
  if (++peer.eager_consumed < Frame::kEagerMessages / 4) return;
  Frame credit;
  credit.kind = Frame::Kind::kCredit;
  credit.count = std::exchange(peer.eager_consumed, 0);
  peer.outbox.push_back({credit, nullptr});
}

bool Exchange::read_on(Peer& peer) {
  if (peer.readings.empty()) return false;
  std::size_t budget = kReadBytes;
  while (!peer.readings.empty()) {
    const Reading& reading = peer.readings.front();
    Transfer& receive = *reading.receive;
    const std::size_t bytes = std::min(budget, receive.bytes() - receive.moved_bytes);
    copy(receive.memory + receive.moved_bytes, reading.source + receive.moved_bytes, bytes);
    receive.moved_bytes += bytes;
    budget -= bytes;
    if (receive.moved_bytes < receive.bytes()) break;
    peer.outbox.push_back({receive.frame(Frame::Kind::kReceived), nullptr});
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
    if (send && send->device < 0) {
      frame.eager =
          send->bytes() <= Frame::kEagerBytes && peer.eager_messages < Frame::kEagerMessages;
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
  }
  std::erase_if(all, [](const TransferPtr& transfer) { return transfer->is_piece(); });
  gpus_.append_unfinished(all);
  return all;
}

bool Exchange::idle() const {
  return posted_.empty() && gpus_.idle() &&
         std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
           return peer.outbox.empty() && peer.streams.empty() && peer.sends.empty() &&
                  peer.receives.empty() && peer.readings.empty();
         });
}

bool Exchange::has_unsent() const {
  return std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
    return !peer.outbox.empty() || !peer.streams.empty();
  });
}

void Exchange::clear() {
  posted_.clear();
  unexpected_.clear();
  done_.clear();
  for (Peer& peer : peers_) peer = {peer.link, {}, {}, {}, {}, {}, 0, 0};
  gpus_.forget();
}

}  // namespace pycomm
