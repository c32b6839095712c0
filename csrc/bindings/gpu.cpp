#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "nccl/report.h"

namespace pycomm {

namespace py = pybind11;

void bind_gpu(py::module_& module) {
  using nccl::Places;
  using nccl::Report;
  py::native_enum<nccl::Transport>(
      module, "GpuTransport", "enum.Enum",
      "What carries calls on GPUs: NCCL, the host's collectives through staging memory, or MPI\n"
      "from GPU memory between hosts. AUTO is NCCL if every rank has it; MPI if none has and each\n"
      "rank's MPI can; else STAGED.")
      .value("AUTO", nccl::Transport::kAuto)
      .value("NCCL", nccl::Transport::kNccl)
      .value("STAGED", nccl::Transport::kStaged)
      .value("MPI", nccl::Transport::kMpi)
      .finalize();
  py::class_<Places>(
      module, "GpuPlaces",
      "Where CUDA, NCCL and our kernels may lie, beside where the loader looks, and how "
      "much of a GPU's memory reductions in exact order may take.")
      .def(py::init<std::vector<std::string>, std::vector<std::string>, std::string, std::size_t>(),
           py::arg("cuda_folders") = std::vector<std::string>(),
           py::arg("nccl_folders") = std::vector<std::string>(), py::arg("kernels") = "",
           py::arg("scratch_bytes") = Places().scratch_bytes);
  py::class_<Report>(module, "GpuReport",
                     "What of the GPU plane is here; each text says what, or why not and what to "
                     "do.")
      .def_readonly("headers", &Report::headers)
      .def_readonly("runtime", &Report::runtime)
      .def_readonly("runtime_file", &Report::runtime_file)
      .def_readonly("driver", &Report::driver)
      .def_readonly("nccl", &Report::nccl)
      .def_readonly("has_nccl", &Report::has_nccl)
      .def_readonly("kernels", &Report::kernels);
  module.def(
      "gpu_report",
      [](const Places& places) {
        const py::gil_scoped_release no_gil;
        return nccl::report(places);
      },
      py::arg("places"), "Look for CUDA and NCCL; loads the libraries and starts nothing.");
}

}  // namespace pycomm
