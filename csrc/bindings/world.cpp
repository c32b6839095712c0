#include "group/world.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/error.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// As much address space as the host has memory: pages cost nothing until they are touched.
std::size_t default_arena_bytes() {
  return static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
         static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

/// For whoever looks at the job from outside.
struct Outside {
  std::string host_name;
  std::string job;
  std::string trace_folder;
  double warn_after_s;
};

Process::Options options_of(double timeout_s, std::size_t arena_bytes, const Tuning& tuning,
                            const nccl::Places& gpu_places, nccl::Transport gpu_transport,
                            nccl::MpiProblem mpi_problem, const Outside& outside,
                            double host_timeout_s) {
  return {timeout_s,
          arena_bytes > 0 ? arena_bytes : default_arena_bytes(),
          {},
          tuning,
          gpu_places,
          gpu_transport,
          std::move(mpi_problem),
          outside.host_name,
          outside.job,
          outside.trace_folder,
          outside.warn_after_s,
          host_timeout_s};
}

/// `ask` is called by a thread that nobody waits for at the end, so it is never given back.
nccl::MpiProblem mpi_problem_of(const py::object& ask) {
  if (ask.is_none()) return {};
  return [function = py::object(ask).release()] {
    const py::gil_scoped_acquire gil;
    return function().cast<std::string>();
  };
}

/// Python's all-gather, for callers that have given Python's lock back.
Process::AllGatherBytes without_gil(const py::function& all_gather_bytes) {
  return [&all_gather_bytes](const std::string& mine) {
    const py::gil_scoped_acquire gil;
    std::vector<std::string> all;
    for (const auto& theirs : all_gather_bytes(py::bytes(mine))) {
      all.push_back(theirs.cast<std::string>());
    }
    return all;
  };
}

std::unique_ptr<World> connect(int rank, int size, const std::string& host_key,
                               const py::function& all_gather_bytes, double timeout_s,
                               std::shared_ptr<Channel> channel, std::size_t arena_bytes,
                               const CostModel& cost, Algorithm algorithm,
                               const nccl::Places& gpu_places, nccl::Transport gpu_transport,
                               const py::object& mpi_problem, const std::string& host_name,
                               const std::string& job, const std::string& trace_folder,
                               double warn_after_s, double host_timeout_s) {
  forget_failures();
  const auto ask = mpi_problem_of(mpi_problem);
  const auto gather = without_gil(all_gather_bytes);
  const py::gil_scoped_release no_gil;
  return World::connect(
      rank, size, host_key, gather, std::move(channel),
      options_of(timeout_s, arena_bytes, {cost, algorithm}, gpu_places, gpu_transport, ask,
                 {host_name, job, trace_folder, warn_after_s}, host_timeout_s),
      interrupt_check());
}

}  // namespace

void bind_world(py::module_& module) {
  py::class_<World>(module, "World",
                    "This process's memory, peers and progress thread; `group` holds all ranks.")
      .def(py::init(&connect), py::arg("rank"), py::arg("size"), py::arg("host_key"),
           py::arg("all_gather_bytes"), py::kw_only(), py::arg("timeout_s"),
           py::arg("channel") = nullptr, py::arg("arena_bytes") = 0, py::arg("cost") = CostModel(),
           py::arg("algorithm") = Algorithm::kAuto, py::arg("gpu_places") = nccl::Places(),
           py::arg("gpu_transport") = nccl::Transport::kAuto, py::arg("mpi_problem") = py::none(),
           py::arg("host_name") = "", py::arg("job") = "", py::arg("trace_folder") = "",
           py::arg("warn_after_s") = 0.0, py::arg("host_timeout_s") = 10.0)
      .def_property_readonly("group", &World::group)
      .def(
          "make_group",
          [](World& world, const std::vector<int>& ranks, const py::function& all_gather_bytes,
             double timeout_s) {
            const auto gather = without_gil(all_gather_bytes);
            const py::gil_scoped_release no_gil;
            return world.make_group(ranks, gather, timeout_s);
          },
          py::arg("ranks"), py::arg("all_gather_bytes"), py::kw_only(), py::arg("timeout_s") = 0.0,
          "A group of these ranks, this one among them, in this order; they alone take part.")
      .def("check_present", &World::check_present, py::arg("ranks"), py::arg("call"),
           py::call_guard<py::gil_scoped_release>(),
           "Raise what ends a call if one of these ranks of the world is gone or leaves.")
      .def("offer_stacks", &World::offer_stacks, py::arg("signal"), py::arg("descriptor"),
           "This process writes the stacks of its threads to `descriptor` on `signal`.")
      .def("lost", &World::lost, "The ranks that are known to have ended without leaving the job.")
      .def("withdraw", &World::withdraw,
           "Make no more calls: who waits for this rank, in any group, hears of it.")
      .def("abort", &World::abort, py::arg("reason"), py::call_guard<py::gil_scoped_release>(),
           "Make every rank's pending and later calls raise `reason`; True if none was before.")
      .def(
          "close",
          [](World& world, double timeout_s, const std::string& failure) {
            // Of an operation that nobody has waited for.
            const std::exception_ptr silent = told_of_failure() ? nullptr : world.failure();
            {
              const py::gil_scoped_release no_gil;
              world.close(interrupt_check(), timeout_s, failure);
            }
            if (silent) std::rethrow_exception(silent);
          },
          py::kw_only(), py::arg("timeout_s") = 0.0, py::arg("failure") = "",
          "Leave together with all other ranks. Raise what has finished a group if nobody was told "
          "of it.");
  module.def(
      "loopback_worlds",
      [](const std::vector<int>& hosts, double timeout_s, std::size_t piece_bytes,
         const nccl::Places& gpu_places, nccl::Transport gpu_transport,
         const std::string& trace_folder, double warn_after_s, double host_timeout_s) {
        if (piece_bytes < Staging::kLeastPieceBytes || piece_bytes % 64 != 0) {
          throw InvalidArgumentError("loopback_worlds: piece_bytes is " +
                                     std::to_string(piece_bytes) +
                                     ". Pass a multiple of 64, at least 1024.");
        }
        Process::Options options{timeout_s, std::size_t{1} << 30, Staging{piece_bytes},
                                 {},        gpu_places,           gpu_transport};
        options.trace_folder = trace_folder;
        options.warn_after_s = warn_after_s;
        options.host_timeout_s = host_timeout_s;
        return World::loopback(hosts, options);
      },
      py::arg("hosts"), py::kw_only(), py::arg("timeout_s") = 60.0,
      py::arg("piece_bytes") = Staging().piece_bytes, py::arg("gpu_places") = nccl::Places(),
      py::arg("gpu_transport") = nccl::Transport::kAuto, py::arg("trace_folder") = "",
      py::arg("warn_after_s") = 0.0, py::arg("host_timeout_s") = 10.0,
      "Worlds whose ranks are threads of this process; rank i lies on pretend host hosts[i]. "
      "Small pieces make small tensors take the way of large ones.");
}

}  // namespace pycomm
