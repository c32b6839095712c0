#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "bindings/bindings.h"
#include "limits/machine_limit.h"

namespace pycomm {

namespace py = pybind11;

void bind_limits(py::module_& module) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<MachineLimit>(module, "MachineLimit",
                           "What one host's cores need for the loads and stores of an all-reduce.")
      .def(py::init([](Group& group, const Buffer& buffer) {
             const py::gil_scoped_release no_gil_here;
             return std::make_unique<MachineLimit>(group, buffer.block);
           }),
           py::arg("group"), py::arg("buffer"), py::keep_alive<1, 2>())
      .def("fold_part", &MachineLimit::fold_part, py::arg("count"), py::arg("dtype"), no_gil)
      .def("show", &MachineLimit::show, py::arg("count"), py::arg("dtype"), no_gil)
      .def("fold_shown", &MachineLimit::fold_shown, py::arg("count"), py::arg("dtype"), no_gil)
      .def("round_trip", &MachineLimit::round_trip, py::arg("trips"), no_gil);
  module.def(
      "time_all_reduces",
      [](Group& group, const std::vector<std::uintptr_t>& addresses, std::size_t count,
         DType dtype) {
        std::vector<std::byte*> buffers;
        for (const std::uintptr_t address : addresses) {
          buffers.push_back(reinterpret_cast<std::byte*>(address));
        }
        const py::gil_scoped_release no_gil_here;
        return time_all_reduces(group, buffers, count, dtype);
      },
      py::arg("group"), py::arg("addresses"), py::arg("count"), py::arg("dtype"),
      "Seconds for an in-place sum of each buffer, one after the other, issued from C++.");
}

}  // namespace pycomm
