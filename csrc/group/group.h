#pragma once

#include <atomic>
#include <cstddef>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collectives/context.h"
#include "core/operation.h"
#include "group/engine.h"
#include "group/execution.h"
#include "group/group_record.h"
#include "group/journal.h"
#include "group/post_office.h"
#include "group/roster.h"
#include "group/work.h"
#include "transport/arena.h"

namespace pycomm {

class Process;

/// Ranks that make collective calls together. Operations run in the order they were issued; a
/// failed one finishes the group, and every later call raises the same error.
///
/// All calls may be made from any thread. Groups are independent: none waits for another's
/// operations or memory.
class Group : public Progressive, public Enrolled, public std::enable_shared_from_this<Group> {
 public:
  /// A member's half of making a group: reserve memory, tell the others, receive what they told.
  ///
  /// @param ranks   world rank of each group rank, the same on every member.
  /// @param gather  collects one record from each member, in group order.
  /// @param timeout_s  of calls that name none, and of groups made from this one; 0: the process's.
  static std::shared_ptr<Group> create(
      std::shared_ptr<Process> process, std::vector<int> ranks,
      const std::function<std::vector<GroupRecord>(const GroupRecord&)>& gather,
      double timeout_s = 0);

  ~Group() override;

  int rank() const { return context_.rank; }
  int size() const { return context_.size(); }
  /// World rank of each group rank.
  const std::vector<int>& ranks() const override { return ranks_; }
  const Placement& placement() const { return placement_; }

  /// Queue an operation and return at once.
  /// @throws InvalidArgumentError  nothing was queued; the group stays usable.
  std::shared_ptr<Work> start(Operation operation);

  /// Run an operation to its end. On an idle group inside one host this happens in the caller's
  /// thread, without a hand-over.
  ///
  /// @param before_waiting  called once unless the operation ends within microseconds: the caller
  ///                        may give back what others need meanwhile (Python's lock).
  void run(Operation operation, const InterruptCheck& check_interrupt,
           const std::function<void()>& before_waiting = {});

  /// Memory in this rank's arena, zeroed, page-aligned: what lies there is reduced without a copy.
  /// It returns to the arena when the last reference dies.
  std::shared_ptr<ArenaBlock> allocate(std::size_t bytes);

  /// Zeroed memory on this rank's GPU, for buckets: from where NCCL, which this group makes known
  /// to it, sends and receives without a copy. It is zeroed on `stream`: order others behind it.
  ///
  /// A collective operation of the group like any other, so that all ranks make their memory known
  /// in one order, and with nothing of the group's on the GPU; waits for them. The sizes may
  /// differ: where they do, NCCL's symmetric kernels have no use for the memory. A collective uses
  /// such memory on every rank or on none, and at the same place in it.
  ///
  /// Dropping the last reference never waits: the progress thread frees the memory once no call of
  /// this group is on the GPU and the GPU is idle for a moment. Whoever drops it after shutdown(),
  /// or after the group, frees it there and then.
  ///
  /// @throws CommError  no such GPU, no NCCL, or not so much memory; RefusedError as GPU calls do.
  std::shared_ptr<DeviceMemory> allocate_on_device(std::size_t bytes, int device,
                                                   StreamAddress stream,
                                                   const InterruptCheck& check_interrupt);

  /// What this rank reserves for the group beside its buckets: its page, staging and message slots.
  std::size_t memory_bytes() const { return memory_->bytes(); }

  /// Where `bytes` at `offset` of the arena of `rank`, which is on this host, are mapped here.
  /// @throws CommError  its arena has none there.
  std::byte* mapped(int rank, std::uint64_t offset, std::size_t bytes) const;

  /// A group of the same ranks with a queue and memory of its own. Collective; a process makes one
  /// group at a time.
  std::shared_ptr<Group> duplicate(const InterruptCheck& check_interrupt);

  /// The group of `ranks` (group ranks of this one, in the order they get there); null on the other
  /// ranks. Collective over all of this group, with the same `ranks` everywhere.
  /// @throws InvalidArgumentError  no rank, one twice, or one that is not in this group.
  std::shared_ptr<Group> new_group(const std::vector<int>& ranks,
                                   const InterruptCheck& check_interrupt);

  /// One group for each color, its ranks ordered by key, then by rank here; null without a color.
  /// Collective over all of this group.
  std::shared_ptr<Group> split(std::optional<std::int64_t> color, std::int64_t key,
                               const InterruptCheck& check_interrupt);

  /// This rank's use of a GPU.
  /// @throws CommError  pycomm was built without it.
  nccl::Plane& gpu_plane();

  /// Messages from one rank to another.
  PostOffice& post_office() { return post_office_; }

  /// Finish the group: this and every other member's pending and later calls raise PeerLostError
  /// with `reason`.
  void abort(const std::string& reason);

  /// Whether an error has finished the group.
  bool failed() const;

  /// Throws what a peer of the group, or the job, has posted.
  void check_notices() const;
  /// Whether a peer has posted such a thing or is gone: its GPU will not do its part.
  bool given_up_elsewhere() const;

  /// Never reuse memory that a peer or the network may still write, because the group has failed.
  void quarantine(std::shared_ptr<ArenaBlock> memory);

  // For the progress thread.
  State advance() override;
  void check() override;
  void abandon() override;

  // For the roster.
  int tag() const override { return context_.tag; }
  bool spans_hosts() const override { return placement_.host_count() > 1; }
  Standing::Use use() const override;
  Standing::Call current_call() const override;
  bool end(NoticeKind kind, int rank, const std::string& text) override;
  std::exception_ptr failure() const override;

 private:
  friend class PostOffice;
  friend class Turn;
  struct Pending {
    Operation operation;
    std::shared_ptr<Work> work;
    Journal::Entry entry;
  };

  Group(std::shared_ptr<Process> process, std::vector<int> ranks, int rank, Placement placement,
        std::shared_ptr<ArenaBlock> memory, Window window, int tag, double timeout_s);

  /// Waits for what is on the GPU; false if that will not end.
  bool has_drained(nccl::GpuGroup& gpus) const;

  // Making groups (split.cpp).
  void all_gather_records(const void* mine, void* all, std::size_t bytes, std::string name,
                          const InterruptCheck& check_interrupt);
  /// The group of `members` (ranks here), null if this rank is none of them; `call` is what the
  /// user called. Every rank of this group takes part.
  std::shared_ptr<Group> create_from(const std::vector<int>& members, const std::string& call,
                                     const InterruptCheck& check_interrupt);

  /// Fill in defaults and refuse what cannot work.
  void prepare(Operation& operation);
  [[noreturn]] void refuse(const Operation& operation, const std::string& problem) const;
  /// The calling thread drives the group, which was idle, until end_turn(). False: it is not idle,
  /// has failed, or spans several hosts.
  bool begin_turn();
  void end_turn();
  std::shared_ptr<Work> enqueue(Operation operation);
  /// Let the progress thread look at the group once more, for memory that was dropped.
  void wake();
  /// Hand the queue to the progress thread.
  void submit();
  void run_here(const Operation& operation, const InterruptCheck& check_interrupt,
                const std::function<void()>& before_waiting);
  void run_there(Operation operation, const InterruptCheck& check_interrupt);
  /// Drive an operation to its end.
  void drive(const Operation& operation, Journal::Entry entry,
             const InterruptCheck& check_interrupt);
  /// The turn's holder has one more operation to run.
  void count_in_turn() {
    run_in_turns_.store(run_in_turns_.load(std::memory_order_relaxed) + 1,
                        std::memory_order_relaxed);
  }
  /// Throws if ranks of other hosts are gone: then `call()` cannot end.
  void check_other_hosts(const std::function<std::string()>& call) const;
  /// Look at the operation that the progress thread drives.
  void check_current();
  /// Every later operation raises `error`, unless another one came first. Under `mutex_`.
  void finish(std::exception_ptr error);
  /// The group is finished by the exception being handled; tells the other members why.
  /// @return  what the caller of the operation is to get.
  std::exception_ptr fail(const std::string& call);
  /// Tell the other members of this host why the group is finished, and save what all did last.
  void tell(NoticeKind kind, const std::string& text);
  /// A failed operation's output lies where a peer that was only stopped may still write.
  void keep_output_of(const Operation& operation);
  /// The progress thread's operation is over.
  void end_current(std::exception_ptr error);
  /// The same with the exception being handled: the group is finished, unless all ranks alike were
  /// refused before anything was sent.
  void end_current_with_error();

  // What was launched on the GPU and has not been seen to end (progress thread).
  bool gpus_busy() const { return gpus_ != nullptr && gpus_->in_flight(); }
  std::string describe_gpu_call() const;  // if they are busy
  /// Look at it; errors finish the group.
  void watch_gpus();

  const std::shared_ptr<Process> process_;
  const std::vector<int> ranks_;
  const Placement placement_;
  const std::shared_ptr<ArenaBlock> memory_;
  Window window_;
  Context context_;
  const double timeout_s_;
  const Journal journal_;
  const std::uint64_t id_;  // the same on all members, and no other group's

  /// Whose turn it is. 0 is an idle group, which a caller's thread takes over, and gives back, by
  /// one atomic operation; all other changes are made under `mutex_`, with what they describe.
  std::atomic<unsigned> state_{0};
  static constexpr unsigned kRunning = 1;   // a thread drives an operation
  static constexpr unsigned kQueued = 2;    // queue_ is not empty: whose turn ends hands it on
  static constexpr unsigned kFinished = 4;  // failure_ is set
  /// Of the thread that called the last operation.
  std::atomic<std::uint32_t> issuer_{thread_number()};
  /// Operations run by callers' threads. Written by whose turn it is.
  std::atomic<std::uint64_t> run_in_turns_{0};

  mutable std::mutex mutex_;
  std::deque<Pending> queue_;
  std::uint64_t queued_ = 0;  // so far
  std::exception_ptr failure_;
  bool aborted_here_ = false;  // before anything else has finished it

  // Touched by the progress thread alone.
  Pending pending_;  // what current_ executes
  std::optional<Execution> current_;
  std::unique_ptr<nccl::GpuGroup> gpus_;  // since the first operation on them

  PostOffice post_office_{*this};
};

}  // namespace pycomm
