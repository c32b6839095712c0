// The module pycomm._core: everything Python can see of the core. Only this folder knows Python;
// the GIL is released around everything that can wait.

#include <pybind11/stl.h>

#include "bindings/bindings.h"
#include "bindings/call_site.h"
#include "core/linger.h"
#include "kernels/fold.h"

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
  pycomm::bind_process_end(module);
  module.def("linger", &pycomm::linger, pybind11::arg("seconds"),
             "Keep TCP connections open for `seconds` after the end of this process.");
  module.def("hide_frames_of", &pycomm::hide_frames_of, pybind11::arg("folders"),
             "Frames of files below these folders are not where the user's code makes a call.");
  module.def("simd_level", &pycomm::simd_level,
             "The instruction set the folds use: avx512, avx2 or baseline.");
}
