#include "core/watchdog.h"

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/bindings.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// A `with` block that must end in time.
struct Watched {
  double seconds;
  std::string text;
  int exit_code;
  std::unique_ptr<Watchdog> dog;
};

}  // namespace

void bind_watchdog(py::module_& module) {
  py::class_<Watched>(
      module, "Watchdog",
      "A `with` block that must end in `seconds`, or the process ends with `text` on stderr.")
      .def(py::init([](double seconds, std::string text, int exit_code) {
             return Watched{seconds, std::move(text), exit_code, nullptr};
           }),
           py::arg("seconds"), py::arg("text"), py::arg("exit_code") = 1)
      .def("__enter__",
           [](Watched& watched) {
             watched.dog =
                 std::make_unique<Watchdog>(watched.seconds, watched.text, watched.exit_code);
           })
      .def("__exit__", [](Watched& watched, const py::args&) { watched.dog.reset(); });
}

}  // namespace pycomm
