#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "nccl/report.h"

namespace pycomm {

namespace py = pybind11;

void bind_gpu(py::module_& module) {
  using nccl::Report;
  py::class_<Report>(module, "GpuReport",
                     "What of the GPU plane is here; each text says what, or why not and what to "
                     "do.")
      .def_readonly("headers", &Report::headers)
      .def_readonly("runtime", &Report::runtime)
      .def_readonly("driver", &Report::driver)
      .def_readonly("nccl", &Report::nccl)
      .def_readonly("kernels", &Report::kernels);
  module.def(
      "gpu_report",
      [](std::vector<std::string> cuda_folders, std::vector<std::string> nccl_folders,
         std::string kernels) {
        const py::gil_scoped_release no_gil;
        return nccl::report({std::move(cuda_folders), std::move(nccl_folders), std::move(kernels)});
      },
      py::arg("cuda_folders"), py::arg("nccl_folders"), py::arg("kernels"),
      "Look for CUDA and NCCL; loads the libraries and starts nothing.");
}

}  // namespace pycomm
