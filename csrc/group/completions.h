#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

namespace pycomm {

/// The works that are over, for one thread that waits for many of them. Who ends a work only notes
/// its ticket here: lower layers never call upper ones.
class Completions {
 public:
  /// What a watcher calls one of its works.
  using Ticket = std::uint64_t;

  void add(Ticket ticket);

  /// Block until a work is over, or for an empty answer until close(); all tickets since the last
  /// call, in the order in which their works ended.
  std::vector<Ticket> next();

  /// Let next() return, now and from now on, once it has told of all.
  void close();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Ticket> tickets_;
  bool closed_ = false;
};

}  // namespace pycomm
