// The module pycomm._core: everything Python can see of the core. Only this folder knows Python;
// the GIL is released around everything that can wait.

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "bindings/bindings.h"
#include "core/linger.h"
#include "kernels/fold.h"

namespace {

int exit_code = 0;
unsigned seconds_for_others = 0;

/// Python runs these functions last, with everything of its own gone, the latest one first.
void leave_at_end(int code, unsigned grace_s) {
  exit_code = code;
  seconds_for_others = grace_s;
  const int failed = Py_AtExit([] {
    std::fflush(nullptr);
    if (seconds_for_others == 0) _exit(exit_code);
    std::signal(SIGALRM, [](int) { _exit(exit_code); });
    alarm(seconds_for_others);
  });
  if (failed) _exit(code);  // all 32 places are taken
}

/// Ends the process unless it is stopped in time. A thread of C++, for where Python's lock is held.
class Watchdog {
 public:
  Watchdog(double seconds, std::string text)
      : text_(std::move(text)), thread_([this, seconds] { watch(seconds); }) {}
  ~Watchdog() { stop(); }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  void stop() {
    {
      std::lock_guard lock(mutex_);
      stopped_ = true;
    }
    changed_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

 private:
  void watch(double seconds) {
    std::unique_lock lock(mutex_);
    const auto limit = std::chrono::duration<double>(seconds);
    if (changed_.wait_for(lock, limit, [this] { return stopped_; })) return;
    std::fputs(text_.c_str(), stderr);
    std::fflush(nullptr);
    _exit(1);
  }

  const std::string text_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of pycomm. Tensors cross as address, element count and dtype.";
  pycomm::bind_errors();
  pycomm::bind_types(module);
  pycomm::bind_work(module);
  pycomm::bind_group(module);
  pycomm::bind_cost(module);
  pycomm::bind_tensor_calls(module);
  pycomm::bind_point_to_point(module);
  pycomm::bind_gpu(module);
  pycomm::bind_limits(module);
  pycomm::bind_world(module);
  pycomm::bind_reducer(module);
  module.def("leave_at_end", &leave_at_end, pybind11::arg("code"), pybind11::arg("grace_s") = 0,
             "When Python has ended, leave with `code` before what other modules do then, or while "
             "they do it, after `grace_s`.");
  pybind11::class_<Watchdog>(module, "Watchdog",
                             "Ends the process with code 1, and says `text`, unless stopped.")
      .def(pybind11::init<double, std::string>(), pybind11::arg("seconds"), pybind11::arg("text"))
      .def("stop", &Watchdog::stop, "All is well.");
  module.def("linger", &pycomm::linger, pybind11::arg("seconds"),
             "Keep TCP connections open for `seconds` after the end of this process.");
  module.def("simd_level", &pycomm::simd_level,
             "The instruction set the folds use: avx512, avx2 or baseline.");
}
