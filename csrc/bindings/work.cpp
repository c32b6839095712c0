#include "group/work.h"

#include <pybind11/functional.h>

#include "bindings/bindings.h"

namespace pycomm {

namespace py = pybind11;

void check_python_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

InterruptCheck interrupt_check() { return check_python_signals; }

void bind_work(py::module_& module) {
  py::class_<Work, std::shared_ptr<Work>>(module, "Work", "An operation in flight.")
      .def(
          "wait",
          [](Work& work) {
            const py::gil_scoped_release no_gil;
            work.wait(interrupt_check());
          },
          "Block until the operation is over; raises what a blocking call would have raised.")
      .def("done", &Work::done, "Whether the operation is over, with an error or without.")
      .def_property_readonly("seconds", &Work::seconds,
                             "From the operation's start to its end; valid once done().");
}

}  // namespace pycomm
