#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace pycomm {

/// Ends the process unless it is destroyed in time: for calls that may wait for ever and that
/// nothing interrupts, of which MPI_Init is one. A thread of its own, since the caller may hold
/// Python's lock all the while.
class Watchdog {
 public:
  /// @param text  written to stderr before the process ends, without clean-up, with `exit_code`.
  Watchdog(double seconds, std::string text, int exit_code);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  std::mutex mutex_;
  std::condition_variable wake_;
  bool called_off_ = false;
  std::thread thread_;
};

}  // namespace pycomm
