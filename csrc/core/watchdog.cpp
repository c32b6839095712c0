#include "core/watchdog.h"

#include <unistd.h>

#include <chrono>
#include <utility>

namespace pycomm {

Watchdog::Watchdog(double seconds, std::string text, int exit_code)
    : thread_([this, seconds, text = std::move(text), exit_code] {
        std::unique_lock lock(mutex_);
        if (wake_.wait_for(lock, std::chrono::duration<double>(seconds),
                           [this] { return called_off_; })) {
          return;
        }
        // A plain write: whoever hangs may hold the locks of stdio.
        [[maybe_unused]] const auto written = write(STDERR_FILENO, text.data(), text.size());
        _exit(exit_code);
      }) {}

Watchdog::~Watchdog() {
  {
    std::lock_guard lock(mutex_);
    called_off_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

}  // namespace pycomm
