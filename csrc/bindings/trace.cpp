#include "transport/trace.h"

#include <pybind11/native_enum.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>

#include "bindings/bindings.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// Texts may have been cut within a character.
py::object decoded(const std::string& text) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
}

double seconds(std::int64_t nanoseconds) { return static_cast<double>(nanoseconds) * 1e-9; }

}  // namespace

void bind_trace(py::module_& module) {
  py::native_enum<Record::State>(module, "OperationState", "enum.Enum")
      .value("QUEUED", Record::State::kQueued)
      .value("RUNNING", Record::State::kRunning)
      .value("DONE", Record::State::kDone)
      .value("FAILED", Record::State::kFailed)
      .finalize();
  py::class_<Record>(module, "Record",
                     "One operation in a flight recorder; times are of the host's steady clock.")
      .def_readonly("number", &Record::number)
      .def_readonly("state", &Record::state)
      .def_property_readonly("queued_s", [](const Record& r) { return seconds(r.queued_ns); })
      .def_property_readonly("started_s", [](const Record& r) { return seconds(r.started_ns); })
      .def_property_readonly("ended_s", [](const Record& r) { return seconds(r.ended_ns); })
      .def_readonly("group", &Record::group)
      .def_property_readonly("group_name",
                             [](const Record& r) { return decoded(r.describe_group()); })
      .def_property_readonly("is_message",
                             [](const Record& r) { return r.what != Record::What::kCollective; })
      .def_property_readonly("sequence", [](const Record& r) { return r.signature.sequence; })
      .def_readonly("hash", &Record::hash)
      .def_readonly("bytes", &Record::bytes)
      .def_property_readonly("call", [](const Record& r) { return decoded(r.describe()); })
      .def_property_readonly("site", [](const Record& r) { return decoded(r.signature.place()); });
  py::class_<RankTrace>(module, "RankTrace", "What the flight recorder of one rank holds.")
      .def_property_readonly("rank", [](const RankTrace& t) { return t.identity.rank; })
      .def_property_readonly("size", [](const RankTrace& t) { return t.identity.size; })
      .def_property_readonly("host", [](const RankTrace& t) { return t.identity.host; })
      .def_property_readonly("process", [](const RankTrace& t) { return t.identity.process; })
      .def_property_readonly(
          "host_name", [](const RankTrace& t) { return decoded(t.identity.host_name.data()); })
      .def_property_readonly("job",
                             [](const RankTrace& t) { return decoded(t.identity.job.data()); })
      .def_property_readonly(
          "to_time_of_day_s",
          [](const RankTrace& t) { return seconds(t.identity.to_time_of_day_ns); })
      .def_readonly("gone", &RankTrace::gone)
      .def_readonly("left", &RankTrace::left)
      .def_readonly("records", &RankTrace::records);
  py::class_<Trace>(module, "Trace", "The recorders of the ranks of one host at one moment.")
      .def_property_readonly("now_s", [](const Trace& t) { return seconds(t.now_ns); })
      .def_property_readonly("reason", [](const Trace& t) { return decoded(t.reason); })
      .def_readonly("ranks", &Trace::ranks);
  module.def("read_trace", &read_trace, py::arg("path"), "A file that was saved upon an error.");
  module.def("read_page_at", &read_page_at, py::arg("path"),
             "The recorder in the memory behind a descriptor of a process: /proc/PID/fd/N.");
}

}  // namespace pycomm
