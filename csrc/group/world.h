#pragma once

#include <memory>
#include <string>
#include <vector>

#include "group/group.h"
#include "group/process.h"

namespace pycomm {

/// One rank's membership in the job: its process-wide state and the group of all ranks.
class World {
 public:
  /// Collective; see Process::connect.
  static std::unique_ptr<World> connect(int rank, int size, const std::string& host_key,
                                        const Process::AllGatherBytes& all_gather_bytes,
                                        std::shared_ptr<Channel> channel, Process::Options options,
                                        const InterruptCheck& check_interrupt);

  /// Ranks of one process, for tests; see Process::loopback.
  static std::vector<std::unique_ptr<World>> loopback(
      const std::vector<int>& hosts, Process::Options options,
      std::vector<std::shared_ptr<Channel>> channels = {});

  ~World();

  const std::shared_ptr<Group>& group() const { return group_; }

  /// A group of some of the world's ranks, in this order, this one among them. They alone take
  /// part: the records by which they find each other go through `all_gather_bytes`, in that order
  /// too.
  /// @param timeout_s  of calls that name none; 0: the world's.
  /// @throws InvalidArgumentError  a rank twice, one that there is not, or without this one.
  std::shared_ptr<Group> make_group(const std::vector<int>& ranks,
                                    const Process::AllGatherBytes& all_gather_bytes,
                                    double timeout_s = 0);

  /// For who waits for these ranks elsewhere than in a call: throws if they will not come. That the
  /// world's group is finished is no reason: its ranks may go on without it.
  /// @throws PeerLostError  one of them is gone, or its host is lost, or the job was ended.
  /// @throws MismatchError  one of them, on this host, leaves the job.
  void check_present(const std::vector<int>& ranks, const std::string& call) const;

  /// From now on this process writes the stacks of its threads to `descriptor` on `signal`.
  void offer_stacks(int signal, int descriptor);

  /// The ranks whose processes have ended without leaving the job: those of this host as soon as
  /// they have, those of another when it has told so, or been silent for too long.
  std::vector<int> lost() const;

  /// This rank will make no more calls: who waits for it, in any group, hears of it. Until close(),
  /// which does not wait for anybody then, it still hears of the others.
  void withdraw();

  /// End the job: every pending and later call of every rank raises PeerLostError with `reason`.
  /// False if another rank, whose reason stands, was first. Between hosts it waits up to 0.2 s
  /// until they have been told.
  bool abort(const std::string& reason);

  /// Leave together with all other ranks; nothing can be communicated afterwards. After an error
  /// that finished the group, or abort(), it leaves alone.
  /// @throws MismatchError  another rank still calls something.
  /// @throws PeerLostError  another rank ended the job.
  /// @param timeout_s  how long to wait for the others; 0: the world's default.
  /// @param failure    why this rank leaves, if for an error, for ranks that still call something.
  void close(const InterruptCheck& check_interrupt, double timeout_s = 0,
             const std::string& failure = {});

  /// The error of an operation that has finished one of this rank's groups; null: there is none.
  std::exception_ptr failure() const;

 private:
  World(std::shared_ptr<Process> process, std::shared_ptr<Group> group)
      : process_(std::move(process)), group_(std::move(group)) {}

  /// Ranks that wait for this one in any group must not wait in vain.
  void announce_leaving();
  void leave();

  std::shared_ptr<Process> process_;
  std::shared_ptr<Group> group_;
  bool aborted_ = false;  // by this rank
  bool withdrawn_ = false;
};

}  // namespace pycomm
