#include "group/completions.h"

#include <utility>

namespace pycomm {

void Completions::add(Ticket ticket) {
  {
    const std::lock_guard lock(mutex_);
    tickets_.push_back(ticket);
  }
  changed_.notify_one();
}

std::vector<Completions::Ticket> Completions::next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return closed_ || !tickets_.empty(); });
  return std::exchange(tickets_, {});
}

void Completions::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_all();
}

}  // namespace pycomm
