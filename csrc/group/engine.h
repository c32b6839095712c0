#pragma once

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "core/thread.h"
#include "group/switchboard.h"
#include "transport/channel.h"
#include "transport/window.h"

namespace pycomm {

/// Something the progress thread moves along: a group's queue.
class Progressive {
 public:
  virtual ~Progressive() = default;

  enum class State {
    kIdle,      // nothing to do; forget it until it is submitted again
    kAdvanced,  // did something
    kWaiting,   // for somebody who will ring the doorbell
    kPolling,   // for something that must be looked at
  };
  virtual State advance() = 0;
  /// Look at deadlines and peers; errors end the operation, not the thread.
  virtual void check() = 0;
  /// The thread ends: nothing submitted will be moved along any more.
  virtual void abandon() = 0;
};

/// The progress thread of a process. It alone calls the channel, drives whatever is submitted, in
/// turns, and holds the process's LifeWord as long as it lives.
class Engine {
 public:
  /// @param channel, switchboard  null inside one host.
  /// @throws CommError  the kernel has no robust futexes.
  Engine(ProcessPage& page, Channel* channel, Switchboard* switchboard);
  /// Stops the thread; what is still submitted is abandoned.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// There is work in `queue` (again). Kept alive until it is idle.
  void submit(std::shared_ptr<Progressive> queue);

  /// Something was posted on the switchboard.
  void wake();

 private:
  void run();
  void drive();
  /// Nothing is submitted: wait until something is. With several hosts it wakes once a period of
  /// the switchboard's (1 s) to send, receive and look: 0.1 ms of a core a second.
  void idle();
  Progressive::State advance_all();

  ProcessPage& page_;
  Channel* const channel_;
  Switchboard* const switchboard_;
  std::vector<std::shared_ptr<Progressive>> active_;  // the thread's own

  std::mutex mutex_;
  Condition wake_;  // from idle()
  std::vector<std::shared_ptr<Progressive>> submitted_;
  bool has_news_ = false;  // on the switchboard
  std::atomic<bool> has_submitted_{false};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> started_{false};
  std::exception_ptr startup_error_;
  Thread thread_;
};

}  // namespace pycomm
