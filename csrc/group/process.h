#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "collectives/placement.h"
#include "core/interrupt_check.h"
#include "group/black_box.h"
#include "group/engine.h"
#include "group/roster.h"
#include "group/switchboard.h"
#include "nccl/plane.h"
#include "transport/arena.h"
#include "transport/channel.h"

namespace pycomm {

/// What the groups of one rank share: memory, peers, channel and progress thread.
class Process {
 public:
  /// Collects one string from every rank, in rank order; provided by whoever started the ranks.
  using AllGatherBytes = std::function<std::vector<std::string>(const std::string&)>;

  struct Options {
    double timeout_s;
    std::size_t arena_bytes;
    Staging staging = {};
    /// The same on all ranks.
    Tuning tuning = {};
    nccl::Places gpu_places = {};
    /// The same on all ranks.
    nccl::Transport gpu_transport = nccl::Transport::kAuto;
    nccl::MpiProblem mpi_problem = {};
    // For whoever looks at the job from outside.
    std::string host_name = {};
    std::string job = {};
    /// Where what the ranks did last is saved when something fails; empty: nowhere.
    std::string trace_folder = {};
    /// See Operation.
    double warn_after_s = 0;
    /// How long another host may be silent before it is lost. The same on all ranks. 0: hosts tell
    /// each other nothing, in tests.
    double host_timeout_s = 10;
  };

  /// Find the other ranks and map the memory of those on the same host. Collective.
  ///
  /// @param host_key  equal on ranks that can share memory.
  /// @param channel   may be null if all ranks have the same key.
  static std::shared_ptr<Process> connect(int rank, int size, const std::string& host_key,
                                          const AllGatherBytes& all_gather_bytes,
                                          std::shared_ptr<Channel> channel, Options options,
                                          const InterruptCheck& check_interrupt);

  /// Ranks of one process, for tests: rank i lies on pretend host `hosts[i]`.
  /// @param channels  one for each rank; none: make_loopback_channels().
  static std::vector<std::shared_ptr<Process>> loopback(
      const std::vector<int>& hosts, Options options,
      std::vector<std::shared_ptr<Channel>> channels = {});

  /// A peer that is still on its way out reads this rank's last announcement a little later.
  ~Process() { arena->keep_pages(); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  const int rank;
  const int size;
  const Options options;
  const Placement placement;  // of the world
  const std::shared_ptr<Arena> arena;
  const std::shared_ptr<Channel> channel;
  /// The arenas of this host's ranks, by local rank, this one's among them.
  const std::vector<std::shared_ptr<Arena>> local_arenas;
  /// Whether every rank of this host has a core, so that a short spin robs nobody.
  const bool may_spin;

  /// The flight recorders of this host's ranks.
  BlackBox& black_box() { return black_box_; }

  ProcessPage& page() const { return page_of(*arena); }
  static ProcessPage& page_of(const Arena& of) {
    return *reinterpret_cast<ProcessPage*>(of.base());
  }
  /// Wake every rank of this host.
  void ring_all() const;
  /// Posted when a rank ends the whole job.
  Notice& job_notice() const { return page_of(*local_arenas.front()).notice; }

  /// The groups of this rank, and who waits in them.
  const std::shared_ptr<Roster>& roster() const { return roster_; }
  void enrol(Enrolled& group);

  // Of other hosts; inside one host there is nothing to tell.
  void tell_end(const Enrolled& group, int group_rank, NoticeKind kind, const std::string& text);
  /// Waits a moment, because the caller is about to leave.
  void tell_end_of_job(const std::string& text);
  /// As Switchboard's.
  std::string loss_among(const std::vector<int>& ranks) const;
  std::string remark_on(const std::vector<int>& ranks) const;

  /// Let the progress thread take care of `queue`.
  /// @throws CommError  after stop().
  void submit(std::shared_ptr<Progressive> queue);
  /// End the progress thread: nothing will be communicated any more.
  void stop();
  bool stopped() const { return stopped_.load(std::memory_order_acquire); }

  int local_rank() const { return placement.local_rank_of[static_cast<std::size_t>(rank)]; }

  /// Zeroed memory in this rank's arena.
  std::shared_ptr<ArenaBlock> allocate(std::size_t bytes);

  /// This rank's use of a GPU, prepared when first asked for.
  /// @throws CommError  pycomm was built without it.
  nccl::Plane& gpu_plane();

  /// Free a dead group's memory once no peer reads it any more.
  void retire(std::shared_ptr<ArenaBlock> memory, std::function<bool()> all_left);

  /// While the result lives no other group can be made: two at once could agree on one channel tag.
  /// @throws CommError  another thread is making a group.
  std::unique_lock<std::mutex> begin_group();

  /// The lowest channel tag that no group of this rank uses yet.
  std::atomic<std::int64_t> free_tag{Channel::kControlTag + 1};

 private:
  struct Retired {
    std::shared_ptr<ArenaBlock> memory;
    std::function<bool()> all_left;
  };
  void free_retired();

  Process(int rank, int size, Options options, Placement placement,
          std::vector<std::string> host_names, std::shared_ptr<ArenaBlock> page_block,
          std::shared_ptr<Arena> arena, std::shared_ptr<Channel> channel,
          std::vector<std::shared_ptr<Arena>> local_arenas);
  std::vector<ProcessPage*> local_pages() const;
  /// Have the progress thread send what was told.
  void wake();

  const std::shared_ptr<ArenaBlock> page_block_;
  BlackBox black_box_;
  std::mutex making_group_;
  std::mutex mutex_;
  std::vector<Retired> retired_;
  const std::shared_ptr<Roster> roster_;
  const std::unique_ptr<Switchboard> switchboard_;  // null inside one host
  std::shared_ptr<Engine> engine_;
  std::unique_ptr<nccl::Plane> gpu_plane_;
  std::atomic<bool> stopped_{false};
};

/// The first block of an arena, so that peers find it at offset 0.
std::shared_ptr<ArenaBlock> make_process_page(Arena& arena);

}  // namespace pycomm
