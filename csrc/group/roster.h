#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "group/fault.h"
#include "transport/notice.h"
#include "transport/standing.h"
#include "transport/window.h"

namespace pycomm {

/// A group as what watches over all of them sees it.
class Enrolled {
 public:
  virtual ~Enrolled() = default;

  /// World ranks.
  virtual const std::vector<int>& ranks() const = 0;
  /// Its first channel tag: no two groups of a rank have the same.
  virtual int tag() const = 0;
  /// Whether some of its ranks are on other hosts.
  virtual bool spans_hosts() const = 0;

  /// From any thread.
  virtual Standing::Use use() const = 0;
  /// The operation that is under way. For the thread that drives it.
  virtual Standing::Call current_call() const = 0;

  /// Finish it on all ranks of this host, unless it is finished, because of what happened
  /// elsewhere. False if it was finished before. Takes no lock.
  virtual bool end(NoticeKind kind, int rank, const std::string& text) = 0;

  /// The error of an operation that has finished it here; null: there is none, or this rank has
  /// aborted it.
  virtual std::exception_ptr failure() const = 0;
};

/// The number that stands for the calling thread in a Standing.
std::uint32_t thread_number();

/// The groups of one rank and its threads that wait in them, from which it tells where it stands,
/// and whether those of its host stand such that none of them can go on.
///
/// A call whose thread never sleeps pays two stores for it, which tell who called, and how often.
class Roster {
 public:
  /// How long an operation is under way before anybody looks into it, and how often then: a fault
  /// has to be seen twice, so it is reported after 1.5 to 2 s.
  static constexpr std::chrono::milliseconds kSettled{1000};
  static constexpr std::chrono::milliseconds kBetweenLooks{500};

  /// @param local_ranks, pages  this host's ranks, by local rank.
  Roster(int rank, std::vector<int> local_ranks, std::vector<ProcessPage*> pages);

  void enrol(Enrolled& group);
  /// Returns once nobody uses `group` any more.
  void strike(const Enrolled& group);

  /// A thread waits for operations of a group, from its first sleep to the end of this object.
  class Waiting {
   public:
    /// @param roster  outlives this.
    Waiting(Roster* roster, int tag) : roster_(roster), tag_(tag) {}
    ~Waiting() {
      if (noted_) roster_->remove(*this);
    }
    Waiting(const Waiting&) = delete;
    Waiting& operator=(const Waiting&) = delete;

    void slept() {
      if (!noted_) roster_->add(*this);
      noted_ = true;
    }

   private:
    friend class Roster;
    Roster* const roster_;
    const int tag_;
    std::uint32_t thread_ = 0;
    Clock::time_point since_;
    bool noted_ = false;
  };

  /// For whoever drives an operation, now and then while it waits.
  /// @param seconds  since the operation began.
  /// @throws MismatchError  it can never end.
  void check(const Enrolled& group, double seconds);

  /// Calls `body(group)` for the group with this tag. False: there is none.
  template <typename Body>
  bool with_group(int tag, const Body& body) {
    std::lock_guard lock(mutex_);
    for (Enrolled* const group : groups_) {
      if (group->tag() != tag) continue;
      body(*group);
      return true;
    }
    return false;
  }
  template <typename Body>
  void for_each_group(const Body& body) {
    std::lock_guard lock(mutex_);
    for (Enrolled* const group : groups_) body(*group);
  }

 private:
  void add(Waiting& waiting);
  void remove(const Waiting& waiting);
  // All of the following hold mutex_.
  void note_call(const Enrolled& group);
  void show();
  void look();
  /// Raise `fault` here, and on the others of this host that it concerns.
  [[noreturn]] void tell_concerned(const Fault& fault);

  /// What the driver of a group has last said of an operation that does not end.
  struct Stuck {
    int tag;
    Clock::time_point noted;
    Standing::Call call;
  };

  const int rank_;
  const std::vector<int> local_ranks_;
  const int local_rank_;
  const std::vector<ProcessPage*> pages_;

  std::mutex mutex_;
  std::vector<Enrolled*> groups_;
  std::vector<const Waiting*> waiting_;
  std::vector<Stuck> stuck_;
  bool shows_calls_ = false;
  Clock::time_point last_look_{};
  std::optional<Fault> suspected_;  // seen once
  std::optional<Fault> found_;      // seen twice
};

}  // namespace pycomm
