// The module pycomm._core: everything Python can see of the core. Only this folder knows Python;
// the GIL is released around everything that can wait.

#include <unistd.h>

#include <cstdio>

#include "bindings/bindings.h"
#include "core/linger.h"
#include "kernels/fold.h"

namespace {

int exit_code = 0;

/// Python runs these functions last, with everything of its own gone, the latest one first.
void leave_at_end(int code) {
  exit_code = code;
  const int failed = Py_AtExit([] {
    std::fflush(nullptr);
    _exit(exit_code);
  });
  if (failed) _exit(code);  // all 32 places are taken
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
  module.def("leave_at_end", &leave_at_end, pybind11::arg("code"),
             "When Python has ended, leave with `code` before what other modules do then.");
  module.def("linger", &pycomm::linger, pybind11::arg("seconds"),
             "Keep TCP connections open for `seconds` after the end of this process.");
  module.def("simd_level", &pycomm::simd_level,
             "The instruction set the folds use: avx512, avx2 or baseline.");
}
