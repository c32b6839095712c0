#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transport/arena.h"
#include "transport/trace.h"

namespace pycomm {

/// Saves what the flight recorders of this host's ranks hold when something has failed.
class BlackBox {
 public:
  /// @param folder  of the job, made when first needed; empty: nothing is saved.
  /// @param arenas  of the host's ranks.
  BlackBox(std::string folder, int host, std::vector<std::shared_ptr<Arena>> arenas);

  /// What an error says of it, on a line of its own; empty if nothing is saved.
  std::string hint() const;

  /// What the recorders hold now.
  Trace take(const std::string& reason) const;

  /// In place of what was saved before. A failure to save is a line on stderr: the error that it is
  /// about must not be lost for it.
  void save(const Trace& trace);

 private:
  const std::string folder_;
  const int host_;
  const std::vector<std::shared_ptr<Arena>> arenas_;
  std::mutex mutex_;
};

}  // namespace pycomm
