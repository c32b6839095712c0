// What happens when Python has ended, while other modules finalise theirs: MPI above all.

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <string>
#include <utility>

#include "bindings/bindings.h"

namespace pycomm {
namespace {

/// Read by a signal handler, when nobody writes it any more.
struct End {
  bool leaves = false;
  int code = 0;
  unsigned leave_after_s = 0;
  std::string farewell;
  unsigned warn_after_s = 0;  // 0: there is nothing to warn of
  std::string warning;
};
End end;

void say(const std::string& text) {
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text.data(), text.size());
}

void on_alarm(int) {
  if (const unsigned waited_s = std::exchange(end.warn_after_s, 0); waited_s > 0) {
    say(end.warning);
    if (end.leaves) alarm(end.leave_after_s - waited_s);
    return;
  }
  say(end.farewell);
  _exit(end.code);
}

/// Python runs these functions last, with everything of its own gone, the latest one first.
void on_end() {
  std::fflush(nullptr);
  if (end.leaves && end.leave_after_s == 0) _exit(end.code);
  if (end.leaves && end.leave_after_s <= end.warn_after_s) end.warn_after_s = 0;
  const unsigned first_s = end.warn_after_s > 0 ? end.warn_after_s : end.leave_after_s;
  if (first_s == 0) return;
  std::signal(SIGALRM, on_alarm);
  alarm(first_s);
}

/// False: all 32 places are taken.
bool register_end() { return Py_AtExit(on_end) == 0; }

void leave_at_end(int code, unsigned seconds, const std::string& text) {
  end.leaves = true;
  end.code = code;
  end.leave_after_s = seconds;
  end.farewell = text;
  if (!register_end()) _exit(code);
}

void warn_at_end(unsigned seconds, const std::string& text) {
  if (end.warn_after_s == 0) register_end();
  end.warn_after_s = seconds;
  end.warning = text;
}

}  // namespace

void bind_process_end(pybind11::module_& module) {
  namespace py = pybind11;
  module.def("leave_at_end", &leave_at_end, py::arg("code"), py::arg("seconds") = 0,
             py::arg("text") = "",
             "When Python has ended, leave with `code` before what other modules do then, or while "
             "they do it, after `seconds`, with `text` on stderr.");
  module.def(
      "warn_at_end", &warn_at_end, py::arg("seconds"), py::arg("text"),
      "When Python has ended and the process is still there after `seconds`, write `text` to "
      "stderr.");
}

}  // namespace pycomm
