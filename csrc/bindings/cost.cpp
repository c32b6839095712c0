#include "collectives/cost.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "collectives/context.h"
#include "core/error.h"
#include "kernels/fold.h"

namespace pycomm {
namespace {

namespace py = pybind11;

py::list plan_all_reduce(const CostModel& cost, std::size_t count, DType dtype, int hosts,
                         int ranks_per_host) {
  if (hosts < 1 || ranks_per_host < 1) {
    throw InvalidArgumentError("plan: " + std::to_string(hosts) + " hosts with " +
                               std::to_string(ranks_per_host) + " ranks each. Both must be >= 1.");
  }
  const AllReduceJob job{count,          dtype,          hosts,
                         ranks_per_host, ranks_per_host, Staging().piece_bytes};
  py::list rows;
  const Algorithm chosen = hosts == 1 ? Algorithm::kAuto : choose_algorithm(cost, job);
  const auto add = [&](Algorithm algorithm) {
    // The first rank of a host also sends the messages that open the operation.
    const Traffic traffic = traffic_of(algorithm, job, 0, 0);
    py::dict row;
    row["algorithm"] = algorithm;
    row["runs"] = algorithm == chosen;
    row["seconds"] = predict_seconds(cost, algorithm, job);
    row["messages"] = traffic.messages;
    row["bytes"] = traffic.bytes;
    rows.append(row);
  };
  if (hosts == 1) {
    add(Algorithm::kAuto);
    return rows;
  }
  for (const auto algorithm : {Algorithm::kDirect, Algorithm::kRing, Algorithm::kGatherFold}) {
    if (is_possible(algorithm, job)) add(algorithm);
  }
  return rows;
}

void add_in_place(std::uintptr_t destination, std::uintptr_t source, std::size_t count) {
  auto* const sum = reinterpret_cast<std::byte*>(destination);
  const auto* const other = reinterpret_cast<const std::byte*>(source);
  const std::array<const std::byte*, 2> sources = {sum, other};
  fold({DType::kFloat32, DType::kFloat32}, sum, sources, count);
}

}  // namespace

void bind_cost(py::module_& module) {
  module.def("add_in_place", &add_in_place, py::arg("destination"), py::arg("source"),
             py::arg("count"), py::call_guard<py::gil_scoped_release>(),
             "destination += source, `count` float32 at these addresses, by the fold that "
             "reductions use: what calibration times.");
  py::class_<CostModel>(module, "CostModel", "What the machine costs, in seconds.")
      .def(py::init([](double alpha_s, double beta_s_per_byte, double gamma_s_per_byte,
                       double meeting_s) {
             return CostModel{alpha_s, beta_s_per_byte, gamma_s_per_byte, meeting_s};
           }),
           py::kw_only(), py::arg("alpha_s") = CostModel().alpha_s,
           py::arg("beta_s_per_byte") = CostModel().beta_s_per_byte,
           py::arg("gamma_s_per_byte") = CostModel().gamma_s_per_byte,
           py::arg("meeting_s") = CostModel().meeting_s)
      .def_readonly("alpha_s", &CostModel::alpha_s)
      .def_readonly("beta_s_per_byte", &CostModel::beta_s_per_byte)
      .def_readonly("gamma_s_per_byte", &CostModel::gamma_s_per_byte)
      .def_readonly("meeting_s", &CostModel::meeting_s);
  module.def(
      "plan_all_reduce", &plan_all_reduce, py::arg("cost"), py::arg("count"), py::arg("dtype"),
      py::arg("hosts"), py::arg("ranks_per_host"),
      "Each possible algorithm: whether it runs, its predicted seconds, and the messages and "
      "bytes that a host's first rank sends to other hosts. One host: a single row, AUTO.");
}

}  // namespace pycomm
