#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/signature.h"
#include "core/task.h"
#include "transport/arena.h"
#include "transport/notice.h"
#include "transport/process_page.h"

namespace pycomm {

/// What a rank shows the others of its host when it starts an operation.
///
/// All that a small operation needs lies in one cache line, which travels once. The signature is
/// read only to explain a mismatch; its lines stay in the cache of the rank that writes them.
struct Announcement {
  /// A payload up to this long travels in the cache line that announces it.
  static constexpr std::size_t kInlineBytes = 48;
  /// A payload up to this long travels beside the announcement; a longer one through staging, or
  /// it is read where it lies in the arena.
  static constexpr std::size_t kEagerBytes = 4096;
  static constexpr std::uint64_t kNotInArena = ~std::uint64_t{0};

  /// Published last, with release order; all of the rest is for the operation of this number.
  alignas(128) std::atomic<std::uint64_t> sequence;
  std::uint64_t hash;
  union {
    /// Without a payload in the line: where in the rank's arena its buffer lies, or kNotInArena.
    std::uint64_t buffer_offset;
    std::array<std::byte, kInlineBytes> inline_payload;
  };

  alignas(128) Signature signature;
  alignas(128) std::array<std::byte, kEagerBytes> eager_payload;
};

/// One rank's shared state for one group.
///
/// Announcements alternate between two slots. A rank writes slot s % 2 for operation s only after
/// it has finished s-1, for which every peer had to arrive, having finished s-2: nobody reads the
/// old content any more.
struct GroupPage {
  std::array<Announcement, 2> announcements;
  /// How many phases of operations this rank has completed since the group began.
  alignas(128) std::atomic<std::uint64_t> phase;
  /// How many of the host's ranks have destroyed the group and read this page no more.
  std::atomic<int> left;
  /// On the group's first local rank's page: somebody is asking why a rank does not come.
  std::atomic<bool> inquiry;
  /// There: somebody saves what the host's ranks did last.
  std::atomic<bool> saved;
  /// Posted on the group's first local rank's page when the group is finished by an error.
  alignas(128) Notice notice;
};

/// One group's view of the ranks that share a host: announcing, waiting, and reading each other's
/// memory. A concrete class: ranks that are threads of one process (in tests) differ from processes
/// only in how the memory came to be mapped.
class Window {
 public:
  struct Peer {
    ProcessPage* process;
    const Arena* arena;  // which the group's process keeps
    GroupPage* page;
    // The rank's memory for this group, behind the page.
    std::byte* staging;
    std::byte* early;
    std::byte* mail;
    /// Rank in the group, for errors.
    int rank;
  };

  /// @param job_notice  of the host's first rank: posted when the whole job ends.
  Window(int local_rank, std::vector<Peer> peers, std::size_t staging_bytes,
         const Notice& job_notice);

  int local_rank() const { return local_rank_; }
  int local_size() const { return static_cast<int>(peers_.size()); }
  int group_rank(int peer) const { return peers_[index(peer)].rank; }
  std::byte* staging(int peer) const { return peers_[index(peer)].staging; }
  std::size_t staging_bytes() const { return staging_bytes_; }
  /// Memory that a rank may fill before it announces an operation. The rule: an operation that uses
  /// it lets no peer touch a rank's after that rank's own end.
  std::byte* early(int peer) const { return peers_[index(peer)].early; }
  /// Where a rank puts its point-to-point messages.
  std::byte* mail(int peer) const { return peers_[index(peer)].mail; }
  Doorbell& doorbell() const { return peers_[index(local_rank_)].process->doorbell; }
  Notice& notice() const { return peers_.front().page->notice; }

  /// Start operation `sequence`: show the peers what it is, where the buffer lies and, if there is
  /// one, a small payload (at most kEagerBytes); one that fits the line takes the place of the
  /// former.
  /// @return  the signature's hash, which is the history of the next operation.
  std::uint64_t announce(const Operation& operation, std::uint64_t sequence, std::uint64_t history,
                         std::uint64_t buffer_offset, const std::byte* payload = nullptr,
                         std::size_t payload_bytes = 0);

  const Signature& announced_signature(int peer, std::uint64_t sequence) const;
  std::uint64_t announced_hash(int peer, std::uint64_t sequence) const;
  /// Where a peer announced its buffer, in this process's addresses; null: not in its arena. Only
  /// if it announced no payload of at most kInlineBytes.
  /// @param bytes  what will be touched there.
  /// @throws MismatchError  they are not in its arena.
  std::byte* announced_buffer(int peer, std::uint64_t sequence, std::size_t bytes) const;
  const std::byte* announced_payload(int peer, std::uint64_t sequence,
                                     std::size_t payload_bytes) const;

  /// Waits until every local rank has announced operation `sequence`.
  class AllAnnounced final : public Wait {
   public:
    /// @param compare  throw MismatchError as soon as a peer's announcement differs from ours.
    AllAnnounced(const Window& window, std::uint64_t sequence, bool compare)
        : window_(window), sequence_(sequence), compare_(compare) {}
    bool poll() override;
    std::string describe() const override;
    bool rings_doorbell() const override { return true; }

   private:
    const Window& window_;
    const std::uint64_t sequence_;
    const bool compare_;
    int next_ = 0;
  };

  /// This rank has completed one more phase of the current operation; tell the others.
  void complete_phase();

  /// Waits until every local rank has completed as many phases as this one.
  ///
  /// It does not end well once a rank has failed, even if all had completed: since its caller has
  /// its error, it may have changed the buffer that others read in its arena, slower ones just now.
  class AllCompleted final : public Wait {
   public:
    explicit AllCompleted(const Window& window) : window_(window), target_(window.phase_) {}
    bool poll() override;
    std::string describe() const override;
    bool rings_doorbell() const override { return true; }

   private:
    const Window& window_;
    const std::uint64_t target_;
    int next_ = 0;
  };

  /// Throws what a peer of the group, or the job, has posted.
  void check_notices() const;

  /// Whether nobody has failed by now, so that what was read in the others' arenas is sound. False:
  /// somebody still writes why, which is then thrown as by check_notices().
  bool all_sound() const;

  /// Group rank of a local process that died, or -1.
  int lost_peer() const;

  /// Group rank of a local process that has called shutdown() without announcing operation
  /// `sequence`, or -1.
  int left_peer(std::uint64_t sequence) const;

  /// Local ranks that the others wait for in operation `sequence`: they have not announced it or,
  /// if all have, have completed fewer phases than this one.
  std::vector<int> missing(std::uint64_t sequence) const;

  bool has_announced(int peer, std::uint64_t sequence) const;

  const ProcessPage& process_page(int peer) const { return *peers_[index(peer)].process; }

  /// Claim the right to ask those who do not come what they are doing: true for the first rank of
  /// the host only, once in the group's life, which the answer ends.
  bool begin_inquiry() const;
  /// The same for the right to save what the ranks did last.
  bool begin_saving() const;

  /// This rank reads its peers' memory no more.
  void leave() const;
  /// Whether no peer reads this rank's memory any more.
  bool all_left() const;

  /// Wake every local rank of the group: something was posted.
  void ring_all() const;

 private:
  /// Wake every other local rank: one of its waits may be over.
  void ring_peers() const;
  static std::size_t index(int peer) { return static_cast<std::size_t>(peer); }
  const Announcement& slot(int peer, std::uint64_t sequence) const {
    return peers_[index(peer)].page->announcements[sequence % 2];
  }

  int local_rank_;
  std::vector<Peer> peers_;
  std::size_t staging_bytes_;
  const Notice& job_notice_;
  std::uint64_t phase_ = 0;
};

}  // namespace pycomm
