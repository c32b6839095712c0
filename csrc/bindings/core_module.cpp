// The module pycomm._core: everything Python can see of the core. Only this folder knows Python;
// the GIL is released around everything that can wait.

#include <pybind11/stl.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <string>

#include "bindings/bindings.h"
#include "bindings/call_site.h"
#include "core/linger.h"
#include "kernels/fold.h"

namespace {

/// What to do when Python has ended, while other modules finalise theirs: MPI above all.
struct End {
  bool leaves = false;
  int code = 0;
  unsigned grace_s = 0;
  std::string warning;
  unsigned warn_after_s = 0;
};
End end;

/// Python runs these functions last, with everything of its own gone, the latest one first.
void on_end() {
  std::fflush(nullptr);
  if (end.leaves && end.grace_s == 0) _exit(end.code);
  if (end.leaves) {
    std::signal(SIGALRM, [](int) { _exit(end.code); });
    alarm(end.grace_s);
  } else if (end.warn_after_s > 0) {
    std::signal(SIGALRM, [](int) {
      [[maybe_unused]] const auto written =
          write(STDERR_FILENO, end.warning.data(), end.warning.size());
    });
    alarm(end.warn_after_s);
  }
}

/// False: all 32 places are taken.
bool register_end() { return Py_AtExit(on_end) == 0; }

void leave_at_end(int code, unsigned grace_s) {
  end.leaves = true;
  end.code = code;
  end.grace_s = grace_s;
  if (!register_end()) _exit(code);
}

void warn_at_end(unsigned seconds, const std::string& text) {
  if (end.warn_after_s == 0) register_end();
  end.warn_after_s = seconds;
  end.warning = text;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "The C++ core of pycomm. Tensors cross as address, element count and dtype.";
  pycomm::bind_errors();
  pycomm::bind_types(module);
  pycomm::bind_bits(module);
  pycomm::bind_work(module);
  pycomm::bind_group(module);
  pycomm::bind_cost(module);
  pycomm::bind_tensor_calls(module);
  pycomm::bind_point_to_point(module);
  pycomm::bind_gpu(module);
  pycomm::bind_limits(module);
  pycomm::bind_world(module);
  pycomm::bind_reducer(module);
  pycomm::bind_trace(module);
  pycomm::bind_watchdog(module);
  module.def("leave_at_end", &leave_at_end, pybind11::arg("code"), pybind11::arg("grace_s") = 0,
             "When Python has ended, leave with `code` before what other modules do then, or while "
             "they do it, after `grace_s`.");
  module.def(
      "warn_at_end", &warn_at_end, pybind11::arg("seconds"), pybind11::arg("text"),
      "When Python has ended and the process is still there after `seconds`, write `text` to "
      "stderr.");
  module.def("linger", &pycomm::linger, pybind11::arg("seconds"),
             "Keep TCP connections open for `seconds` after the end of this process.");
  module.def("hide_frames_of", &pycomm::hide_frames_of, pybind11::arg("folders"),
             "Frames of files below these folders are not where the user's code makes a call.");
  module.def("simd_level", &pycomm::simd_level,
             "The instruction set the folds use: avx512, avx2 or baseline.");
}
