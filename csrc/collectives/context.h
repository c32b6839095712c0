#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "collectives/cost.h"
#include "collectives/placement.h"
#include "core/operation.h"
#include "transport/channel.h"
#include "transport/window.h"

namespace pycomm {

/// The ranks, one on each host, that exchange one share of every buffer between the hosts.
struct Lane {
  Channel& channel;
  int tag;
  int host;                // mine
  std::vector<int> peers;  // world rank of this lane's member, by host

  int host_count() const { return static_cast<int>(peers.size()); }
  /// Hosts are modulo host_count(), so `host + 1` needs no care.
  int wrap(int other) const { return (other % host_count() + host_count()) % host_count(); }

  std::unique_ptr<Message> send(int to_host, std::span<const std::byte> bytes) const {
    return channel.send(peers[static_cast<std::size_t>(wrap(to_host))], tag, bytes);
  }
  std::unique_ptr<Message> receive(int from_host, std::span<std::byte> bytes) const {
    return channel.receive(peers[static_cast<std::size_t>(wrap(from_host))], tag, bytes);
  }
  std::unique_ptr<Message> receive_at_most(int from_host, std::span<std::byte> room,
                                           std::size_t& length) const {
    return channel.receive_at_most(peers[static_cast<std::size_t>(wrap(from_host))], tag, room,
                                   length);
  }
};

/// The staging memory that each rank of a group has. Inside one host three pieces suffice; between
/// hosts there is more, which each collective divides in its own way (see PiecePlan). No result
/// depends on the size of a piece.
struct Staging {
  static constexpr std::size_t kLeastPieceBytes = 1024;

  /// A multiple of 64, at least kLeastPieceBytes. The default keeps what a core copies in and folds
  /// within its cache.
  std::size_t piece_bytes = 512 << 10;

  /// Each of the slots through which tensors on GPUs go where there is no NCCL (nccl/staged.h):
  /// long enough for copies at the speed of the bus. The same on all ranks.
  std::size_t gpu_slot_bytes = 4 << 20;

  constexpr std::size_t bytes(int host_count) const {
    return (host_count == 1 ? 3 : 10) * piece_bytes;
  }
  /// Behind those: what a rank may fill before its operation is open, because no peer touches it
  /// then (see Window::early).
  constexpr std::size_t early_bytes() const { return piece_bytes / 2 / 64 * 64; }
};

/// Everything a collective may use, owned by the group it runs in.
struct Context {
  Window& window;
  Channel* channel;  // null inside one host
  int tag;
  const Placement& placement;
  const std::vector<int>& world_ranks;  // by group rank
  Arena& arena;                         // this rank's
  Staging staging;
  Tuning tuning;
  int rank;
  std::uint64_t sequence = 0;  // of the current operation
  std::uint64_t parts = 0;     // of the numbers so far, how many went to parts of operations
  /// The last operation this rank has announced: the current one, or the one before it.
  std::uint64_t announced = 0;
  /// The last operation whose part this rank has folded where the buffers lie; it may still wait
  /// for the others.
  std::uint64_t folded = 0;
  std::uint64_t history = 0;  // hash over all announced ones
  /// Room for a pointer to each local rank's memory, so that no operation need allocate.
  std::vector<const std::byte*> sources =
      std::vector<const std::byte*>(static_cast<std::size_t>(window.local_size()));
  std::vector<std::byte*> destinations =
      std::vector<std::byte*>(static_cast<std::size_t>(window.local_size()));

  /// A collective that is a part of the current operation begins, and has a number of its own.
  void begin_part() {
    ++sequence;
    ++parts;
  }

  int size() const { return static_cast<int>(world_ranks.size()); }
  int host() const { return placement.host_of[static_cast<std::size_t>(rank)]; }
  int host_count() const { return placement.host_count(); }
  /// Group ranks of a host.
  const std::vector<int>& ranks_of(int other_host) const {
    return placement.hosts[static_cast<std::size_t>(other_host)];
  }
  int world_rank(int group_rank) const { return world_ranks[static_cast<std::size_t>(group_rank)]; }

  /// Lane `index`, made of each host's rank at that position.
  Lane lane(int index) const;

  AllReduceJob job_of(const Operation& operation) const {
    return {operation.count,        operation.dtype,   host_count(),
            placement.most_ranks(), placement.lanes(), staging.piece_bytes};
  }

  /// Offset of a buffer that lies in this rank's arena, else Announcement::kNotInArena.
  std::uint64_t arena_offset(const void* buffer, std::size_t bytes) const;

  /// Where a rank of this host announced its buffer of the current operation, in this process's
  /// addresses; null: not in its arena. See Window::announced_buffer.
  std::byte* announced_buffer(int group_rank, std::size_t bytes) const {
    return window.announced_buffer(placement.local_rank_of[static_cast<std::size_t>(group_rank)],
                                   sequence, bytes);
  }
};

/// "all_reduce 'bucket 3' of 4096 float32, SUM (call #41) on rank 2": the current call, for errors.
std::string describe_call(const Context& context, const Operation& operation);

}  // namespace pycomm
