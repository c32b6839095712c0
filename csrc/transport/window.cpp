#include "transport/window.h"

#include <cstring>
#include <utility>

#include "core/error.h"

namespace pycomm {

Window::Window(int local_rank, std::vector<Peer> peers, std::size_t staging_bytes,
               const Notice& job_notice)
    : local_rank_(local_rank),
      peers_(std::move(peers)),
      staging_bytes_(staging_bytes),
      job_notice_(job_notice) {}

std::uint64_t Window::announce(const Operation& operation, std::uint64_t sequence,
                               std::uint64_t history, std::uint64_t buffer_offset,
                               const std::byte* payload, std::size_t payload_bytes) {
  Announcement& mine = peers_[index(local_rank_)].page->announcements[sequence % 2];
  mine.signature.assign(operation, sequence, history);
  const std::uint64_t hash = mine.signature.hash();
  mine.hash = hash;
  if (payload_bytes > 0 && payload_bytes <= Announcement::kInlineBytes) {
    std::memcpy(mine.inline_payload.data(), payload, payload_bytes);
  } else {
    mine.buffer_offset = buffer_offset;
    if (payload_bytes > 0) std::memcpy(mine.eager_payload.data(), payload, payload_bytes);
  }
  mine.sequence.store(sequence, std::memory_order_release);
  ring_peers();
  return hash;
}

const Signature& Window::announced_signature(int peer, std::uint64_t sequence) const {
  return slot(peer, sequence).signature;
}

std::uint64_t Window::announced_hash(int peer, std::uint64_t sequence) const {
  return slot(peer, sequence).hash;
}

std::byte* Window::announced_buffer(int peer, std::uint64_t sequence, std::size_t bytes) const {
  const std::uint64_t offset = slot(peer, sequence).buffer_offset;
  const Peer& theirs = peers_[index(peer)];
  if (theirs.arena->holds(offset, bytes)) return theirs.arena->base() + offset;
  if (offset == Announcement::kNotInArena) return nullptr;
  throw MismatchError(
      "call #" + std::to_string(sequence) + ": rank " + std::to_string(theirs.rank) +
      " announced " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
      " of its shared memory, which has " + std::to_string(theirs.arena->reserve_bytes()) +
      ".\n  All ranks must run the same version of pycomm. If they do, something has overwritten "
      "pycomm's memory on that rank: read its log first.");
}

const std::byte* Window::announced_payload(int peer, std::uint64_t sequence,
                                           std::size_t payload_bytes) const {
  const Announcement& announcement = slot(peer, sequence);
  return payload_bytes <= Announcement::kInlineBytes ? announcement.inline_payload.data()
                                                     : announcement.eager_payload.data();
}

bool Window::AllAnnounced::poll() {
  for (; next_ < window_.local_size(); ++next_) {
    const Announcement& theirs = window_.slot(next_, sequence_);
    if (theirs.sequence.load(std::memory_order_acquire) != sequence_) return false;
    if (!compare_) continue;
    const Announcement& mine = window_.slot(window_.local_rank_, sequence_);
    if (theirs.hash != mine.hash) {
      throw MismatchError(describe_mismatch(window_.group_rank(window_.local_rank_), mine.signature,
                                            window_.group_rank(next_), theirs.signature));
    }
  }
  return true;
}

std::string Window::AllAnnounced::describe() const {
  return "rank " + std::to_string(window_.group_rank(next_)) + " to make this call";
}

void Window::complete_phase() {
  ++phase_;
  peers_[index(local_rank_)].page->phase.store(phase_, std::memory_order_release);
  ring_peers();
}

bool Window::AllCompleted::poll() {
  for (; next_ < window_.local_size(); ++next_) {
    const auto& phase = window_.peers_[index(next_)].page->phase;
    if (phase.load(std::memory_order_acquire) < target_) return false;
  }
  return window_.all_sound();
}

std::string Window::AllCompleted::describe() const {
  if (next_ == window_.local_size()) return "a rank that has failed to say why";
  return "rank " + std::to_string(window_.group_rank(next_)) + " to finish its part of this call";
}

void Window::check_notices() const {
  if (notice().posted()) notice().raise();
  if (job_notice_.posted()) job_notice_.raise();
}

bool Window::all_sound() const {
  // Behind whatever this rank has read in the others' arenas.
  std::atomic_thread_fence(std::memory_order_acquire);
  if (notice().silent() && job_notice_.silent()) return true;
  check_notices();
  return false;
}

int Window::lost_peer() const {
  for (const Peer& peer : peers_) {
    if (peer.process->life.owner_died()) return peer.rank;
  }
  return -1;
}

int Window::left_peer(std::uint64_t sequence) const {
  for (int peer = 0; peer < local_size(); ++peer) {
    if (peers_[index(peer)].process->leaving.load(std::memory_order_acquire) &&
        slot(peer, sequence).sequence.load(std::memory_order_acquire) != sequence) {
      return peers_[index(peer)].rank;
    }
  }
  return -1;
}

bool Window::has_announced(int peer, std::uint64_t sequence) const {
  return slot(peer, sequence).sequence.load(std::memory_order_acquire) >= sequence;
}

std::vector<int> Window::missing(std::uint64_t sequence) const {
  std::vector<int> unannounced;
  std::vector<int> behind;
  for (int peer = 0; peer < local_size(); ++peer) {
    if (!has_announced(peer, sequence)) {
      unannounced.push_back(peer);
    } else if (peers_[index(peer)].page->phase.load(std::memory_order_acquire) < phase_) {
      behind.push_back(peer);
    }
  }
  return unannounced.empty() ? behind : unannounced;
}

bool Window::begin_saving() const {
  return !peers_.front().page->saved.exchange(true, std::memory_order_acq_rel);
}

bool Window::begin_inquiry() const {
  return !peers_.front().page->inquiry.exchange(true, std::memory_order_acq_rel);
}

void Window::leave() const {
  // Told to every peer, because the one that hears it last frees its page: nobody may ask there.
  for (const Peer& peer : peers_) peer.page->left.fetch_add(1, std::memory_order_acq_rel);
}

bool Window::all_left() const {
  return peers_[index(local_rank_)].page->left.load(std::memory_order_acquire) == local_size();
}

void Window::ring_peers() const {
  Doorbell::fence();
  for (const Peer& peer : peers_) {
    if (&peer != &peers_[index(local_rank_)]) peer.process->doorbell.ring_after_fence();
  }
}

void Window::ring_all() const {
  Doorbell::fence();
  for (const Peer& peer : peers_) peer.process->doorbell.ring_after_fence();
}

}  // namespace pycomm
