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
  BlackBox(const std::string& folder, int host, std::vector<std::shared_ptr<Arena>> arenas);

  /// What an error says of it, on a line of its own; empty if nothing is saved.
  std::string hint() const;

  /// What the recorders hold now.
  Trace take(const std::string& reason) const;

  /// In place of what was saved before. A failure to save is a line on stderr: the error that it is
  /// about must not be lost for it. Nor must it wait for a disk: after a second this returns, and
  /// the trace is saved once the disk goes on.
  void save(Trace trace);

 private:
  /// What threads that save have in common; they may outlive this.
  struct Shelf {
    const std::string folder;
    const std::string path;
    std::mutex mutex;

    void put(const Trace& trace);
  };

  const std::shared_ptr<Shelf> shelf_;
  const std::vector<std::shared_ptr<Arena>> arenas_;
};

}  // namespace pycomm
