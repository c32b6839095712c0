#include "group/work.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace pycomm {

namespace py = pybind11;

void check_python_signals() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

InterruptCheck interrupt_check() { return check_python_signals; }

void bind_work(py::module_& module) {
  py::class_<Completions, std::shared_ptr<Completions>>(
      module, "Completions", "The works that are over, for one thread that waits for many of them.")
      .def(py::init<>())
      .def("next", &Completions::next, py::call_guard<py::gil_scoped_release>(),
           "Block until a work is over; the tickets of all since the last call. Empty: closed.")
      .def("close", &Completions::close, "Let next() return, now and from now on.");
  py::class_<Work, std::shared_ptr<Work>>(module, "Work", "An operation in flight.")
      .def(
          "wait",
          [](Work& work) {
            const py::gil_scoped_release no_gil;
            work.wait(interrupt_check());
          },
          "Block until the operation is over; raises what a blocking call would have raised.")
      .def("done", &Work::done, "Whether the operation is over, with an error or without.")
      .def("announce_to", &Work::announce_to, py::arg("completions"), py::arg("ticket"),
           "Note `ticket` there when the operation is over, at once if it is. Called once.")
      .def("settled", &Work::settled,
           "Whether its memory is free: the operation is over, on a GPU too.")
      .def(
          "order_before",
          [](Work& work, const py::function& current_stream) {
            if (work.device_call() == nullptr) return;
            const auto stream = current_stream(work.device_call()->device()).cast<StreamAddress>();
            work.device_call()->order_before(stream);
          },
          py::arg("current_stream"),
          "What is put on the stream current_stream(device) from now on waits for the GPU; nothing "
          "for operations on the host. After wait().")
      .def_property_readonly("seconds", &Work::seconds,
                             "From the operation's start to its end; valid once done().");
}

}  // namespace pycomm
