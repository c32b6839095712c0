#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "collectives/placement.h"
#include "core/clock.h"
#include "core/thread.h"
#include "group/control_message.h"
#include "group/fault.h"
#include "group/roster.h"
#include "transport/channel.h"
#include "transport/notice.h"
#include "transport/window.h"

namespace pycomm {

/// What the hosts of a job tell each other beside its data, through the progress threads: that they
/// are there, who is gone, what is over, and where ranks stand that do not get on.
///
/// One rank speaks for each host: the first whose progress thread has been seen lately, so that a
/// rank that is stopped does not silence its host. Speakers send each other a beat every period,
/// busy or idle; a host of which nothing has come for the time-out is lost. (A host that computes,
/// or shares its cores, still answers: its progress threads only have to run once in that time.) A
/// beat names the ranks of its host that do not run, and goes to all of the other hosts then: any
/// of them may be the first to give up, and has to say so. Speakers also tell all ranks of the job
/// of a rank of their host that has died, which they see in shared memory, and collect all hosts'
/// standings, among which each looks for faults. That a group is over the rank that says so first
/// tells its members itself.
///
/// A loss ends the groups that have a lost member, each at its next look.
///
/// Cost: with H hosts H-1 messages of 140 bytes a period and speaker, and a probe of the channel
/// every 20 ms on ranks that communicate. An idle rank wakes once a period to do the same. Of a
/// rank that waits for long, 2.3 KB go to each other host twice a second.
class Switchboard {
 public:
  struct Setting {
    int rank;
    const Placement& placement;           // of the world
    std::vector<std::string> host_names;  // for errors, by host
    std::vector<ProcessPage*> pages;      // of this host's ranks, by local rank
    double host_timeout_s;
  };

  /// @param roster, job_notice, and what `setting` refers to outlive this.
  Switchboard(Setting setting, Channel& channel, Roster& roster, Notice& job_notice);
  ~Switchboard();
  Switchboard(const Switchboard&) = delete;
  Switchboard& operator=(const Switchboard&) = delete;

  // From any thread. Who posts something then has to wake the progress thread.

  /// Tell the group's members on other hosts that it is over.
  void tell_end(const Enrolled& group, int group_rank, NoticeKind kind, const std::string& text);
  /// Tell all other hosts that the job is over.
  void tell_end_of_job(const std::string& text);
  /// Wait until the progress thread has sent what was told, for who is about to leave.
  void await_sent(std::chrono::milliseconds at_most);
  /// A group has become known: what was told of it before.
  void deliver_early(Enrolled& group);
  /// Why one of these ranks of the world, all of them, or none (empty) is lost.
  std::string loss_among(const std::vector<int>& ranks) const;
  /// Which of these do not run while their host does, as an addition to an error; may be empty.
  std::string remark_on(const std::vector<int>& ranks) const;

  // For the progress thread.

  /// How often attend() has to be called at least.
  Clock::duration period() const { return period_; }
  /// Send, receive, look. Cheap when called again at once.
  void attend();
  /// This rank leaves the job: somebody else speaks for its host. Takes at most 50 ms.
  void leave();

 private:
  struct Host {
    int speaker;  // as far as known
    Clock::time_point heard;
    bool heard_ever = false;
    bool is_over = false;  // lost, or all its ranks have left
  };
  struct Letter {
    int to;
    std::vector<std::byte> bytes;
    std::unique_ptr<Message> message = nullptr;  // once it is sent
  };
  enum class Fate { kOnItsWay, kOver, kLost };
  struct Arriving {
    int from;
    std::vector<std::byte> bytes = {};
    std::unique_ptr<Message> message = nullptr;
    Fate fate = Fate::kOnItsWay;
  };
  struct Shown {
    std::uint64_t version = 0;
    Standing standing;
  };

  static std::size_t index(int number) { return static_cast<std::size_t>(number); }
  int world_size() const { return static_cast<int>(setting_.placement.host_of.size()); }
  int host_of(int rank) const { return setting_.placement.host_of[index(rank)]; }
  const std::vector<int>& ranks_of(int host) const { return setting_.placement.hosts[index(host)]; }
  std::string name_of(int host) const;

  void post(const std::vector<int>& to, const control::Body& body);
  void send();
  void receive();
  /// Send or poll a message: `call` returns whether it is over. One that raises is lost, and is
  /// polled no more; so is its peer, if that is what it raises.
  Fate attempt(int peer, const std::function<bool()>& call);
  void handle(int from, const control::Body& body);
  void handle(int from, const control::Beat& beat);
  void handle(int from, const control::Loss& loss);
  void handle(int from, const control::End& end);
  void handle(int from, const Standing& standing);
  void handle(int from, const control::Leave& leave);

  bool runs(int local_rank) const;
  bool speaks() const;
  /// Everyone else that can still be told something.
  std::vector<int> others() const;
  std::vector<int> of_other_hosts() const;
  /// Who speaks for the other hosts, or may.
  std::vector<int> speakers() const;
  void look_for_deaths();
  void beat();
  void look_for_silence();
  void pass_on_standings();
  void look_for_faults();
  /// Have `rank` finish a group of its, and tell the other members.
  void end_for_all(int rank, const control::End& end);
  /// This rank has found a loss: it counts here, and is told to all.
  void declare_lost(const std::vector<int>& ranks, const std::string& text);
  void note_lost(const std::vector<int>& ranks, const std::string& text);
  bool is_lost(int rank) const;

  const Setting setting_;
  Channel& channel_;
  Roster& roster_;
  Notice& job_notice_;
  const int my_host_;
  const int local_rank_;
  const Clock::duration timeout_;
  const Clock::duration period_;
  const Clock::time_point began_;

  // The progress thread's own.
  std::vector<Host> hosts_;
  std::deque<Letter> on_their_way_;
  std::vector<Arriving> arriving_;
  std::map<int, Shown> shown_;  // by rank
  std::optional<std::string> suspected_;
  Clock::time_point last_attended_;
  Clock::time_point last_tick_;
  Clock::time_point last_fault_look_;
  bool misunderstood_ = false;  // what came was no message of ours: listen no more

  mutable std::mutex mutex_;
  Condition sent_;
  std::vector<Letter> outbox_;
  std::size_t unsent_ = 0;  // there, or on their way
  std::atomic<bool> has_letters_{false};
  std::map<int, std::string> lost_;  // why, by rank
  std::atomic<bool> has_lost_{false};
  std::map<int, Clock::time_point> stalled_;  // ranks of other hosts that do not run: last told
  std::map<int, control::End> early_ends_;    // of groups that are not known yet, by tag
};

}  // namespace pycomm
