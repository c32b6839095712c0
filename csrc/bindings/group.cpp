#include "group/group.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/call_site.h"
#include "core/error.h"
#include "group/turn.h"

namespace pycomm {
namespace {

namespace py = pybind11;

std::byte* pointer(std::uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

/// What Python takes for a whole number; NumPy's are.
std::int64_t whole_number(const Group& group, const char* call, const char* argument,
                          const py::object& value) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  int overflow = 0;
  const long long found = number ? PyLong_AsLongLongAndOverflow(number.ptr(), &overflow) : 0;
  if (number && overflow == 0) return found;
  PyErr_Clear();
  throw InvalidArgumentError(std::string(call) + " on rank " + std::to_string(group.rank()) + ": " +
                             argument + " is " + std::string(py::repr(value)) +
                             ". Pass a whole number of at most 64 bits.");
}

/// What all collectives have in common.
struct Call {
  Group& group;
  Operation operation;

  Call(Group& group, Kind kind, const py::object& shape, std::string&& name, const Place& place,
       double timeout_s)
      : group(group) {
    operation.kind = kind;
    operation.name = std::move(name);
    operation.timeout_s = timeout_s;
    operation.site = call_site();
    if (place) std::tie(operation.device, operation.stream) = *place;
    if (shape.is_none()) return;
    const auto dims = py::reinterpret_borrow<py::sequence>(shape);
    operation.shape.count = 0;
    for (const auto& dim : dims) operation.shape.append(dim.cast<std::int64_t>());
  }

  std::shared_ptr<Work> issue(bool async_op) {
    std::optional<py::gil_scoped_release> no_gil;
    const auto release = [&no_gil] { no_gil.emplace(); };
    if (!async_op) {
      group.run(std::move(operation), interrupt_check(), release);
      return nullptr;
    }
    release();
    return group.start(std::move(operation));
  }
};

/// What the reductions have in common, besides.
struct Reduction {
  ReduceOp op;
  std::int64_t divisor;
  double prescale;
  double postscale;
  Algorithm algorithm;
};

void set_reduction(Operation& operation, const Reduction& reduction) {
  operation.op = reduction.op;
  operation.divisor = reduction.divisor;
  operation.prescale = reduction.prescale;
  operation.postscale = reduction.postscale;
  operation.algorithm = reduction.algorithm;
}

void set_memory(Operation& operation, std::uintptr_t input, std::uintptr_t output,
                std::size_t count, DType dtype) {
  operation.input = pointer(input);
  operation.output = pointer(output);
  operation.count = count;
  operation.dtype = dtype;
}

std::shared_ptr<Work> all_reduce(Group& group, std::uintptr_t input, std::uintptr_t output,
                                 std::size_t count, DType dtype, ReduceOp op, std::int64_t divisor,
                                 double prescale, double postscale, Algorithm algorithm,
                                 const py::object& shape, std::string name, const Place& place,
                                 double timeout_s, bool async_op) {
  Call call(group, Kind::kAllReduce, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  set_reduction(call.operation, {op, divisor, prescale, postscale, algorithm});
  return call.issue(async_op);
}

std::shared_ptr<Work> reduce(Group& group, std::uintptr_t input, std::uintptr_t output,
                             std::size_t count, DType dtype, ReduceOp op, int root,
                             std::int64_t divisor, double prescale, double postscale,
                             Algorithm algorithm, const py::object& shape, std::string name,
                             const Place& place, double timeout_s, bool async_op) {
  Call call(group, Kind::kReduce, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  set_reduction(call.operation, {op, divisor, prescale, postscale, algorithm});
  call.operation.root = root;
  return call.issue(async_op);
}

std::shared_ptr<Work> reduce_scatter(Group& group, std::uintptr_t input, std::uintptr_t output,
                                     std::size_t count, DType dtype, ReduceOp op,
                                     std::int64_t divisor, double prescale, double postscale,
                                     Algorithm algorithm, const py::object& shape, std::string name,
                                     const Place& place, double timeout_s, bool async_op) {
  Call call(group, Kind::kReduceScatter, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  set_reduction(call.operation, {op, divisor, prescale, postscale, algorithm});
  return call.issue(async_op);
}

/// broadcast and scatter.
template <Kind kind>
std::shared_ptr<Work> from_root(Group& group, std::uintptr_t input, std::uintptr_t output,
                                std::size_t count, DType dtype, int root, const py::object& shape,
                                std::string name, const Place& place, double timeout_s,
                                bool async_op) {
  Call call(group, kind, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  call.operation.root = root;
  return call.issue(async_op);
}

std::shared_ptr<Work> all_gather(Group& group, std::uintptr_t input, std::uintptr_t output,
                                 std::size_t count, DType dtype,
                                 std::vector<std::size_t> output_counts, const py::object& shape,
                                 std::string name, const Place& place, double timeout_s,
                                 bool async_op) {
  Call call(group, Kind::kAllGather, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  call.operation.output_counts = std::move(output_counts);
  return call.issue(async_op);
}

std::shared_ptr<Work> gather(Group& group, std::uintptr_t input, std::uintptr_t output,
                             std::size_t count, DType dtype, int root,
                             std::vector<std::size_t> output_counts, const py::object& shape,
                             std::string name, const Place& place, double timeout_s,
                             bool async_op) {
  Call call(group, Kind::kGather, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  call.operation.root = root;
  call.operation.output_counts = std::move(output_counts);
  return call.issue(async_op);
}

std::shared_ptr<Work> all_to_all(Group& group, std::uintptr_t input, std::uintptr_t output,
                                 std::size_t count, DType dtype,
                                 std::vector<std::size_t> input_counts,
                                 std::vector<std::size_t> output_counts, const py::object& shape,
                                 std::string name, const Place& place, double timeout_s,
                                 bool async_op) {
  Call call(group, Kind::kAllToAll, shape, std::move(name), place, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  call.operation.input_counts = std::move(input_counts);
  call.operation.output_counts = std::move(output_counts);
  return call.issue(async_op);
}

/// A turn as Python holds it: until it lets it go, or close().
struct HeldTurn {
  std::shared_ptr<Group> group;
  std::unique_ptr<Turn> turn;
};

std::optional<HeldTurn> take_turn(const std::shared_ptr<Group>& group) {
  auto turn = Turn::take(group);
  if (!turn) return std::nullopt;
  return HeldTurn{group, std::move(turn)};
}

void all_reduce_in_turn(HeldTurn& held, std::uintptr_t input, std::uintptr_t output,
                        std::size_t count, DType dtype, ReduceOp op, double prescale,
                        const py::object& shape, std::string name, double timeout_s) {
  Call call(*held.group, Kind::kAllReduce, shape, std::move(name), std::nullopt, timeout_s);
  set_memory(call.operation, input, output, count, dtype);
  set_reduction(call.operation, {op, 0, prescale, 1.0, Algorithm::kAuto});
  const py::gil_scoped_release no_gil;
  held.turn->start(std::move(call.operation));
}

std::shared_ptr<Work> barrier(Group& group, double timeout_s, bool async_op) {
  return Call(group, Kind::kBarrier, py::none(), "", std::nullopt, timeout_s).issue(async_op);
}

}  // namespace

void bind_group(py::module_& module) {
  py::class_<Buffer>(module, "Buffer", py::buffer_protocol(),
                     "Zeroed memory in this rank's arena, with the (writable) buffer protocol.")
      .def_property_readonly("address",
                             [](const Buffer& buffer) {
                               return reinterpret_cast<std::uintptr_t>(buffer.block->data());
                             })
      .def("__len__", [](const Buffer& buffer) { return buffer.block->bytes(); })
      .def_buffer([](Buffer& buffer) {
        return py::buffer_info(reinterpret_cast<unsigned char*>(buffer.block->data()),
                               static_cast<py::ssize_t>(buffer.block->bytes()));
      });

  const std::vector<std::size_t> no_counts;
  const auto input = py::arg("input");
  const auto output = py::arg("output");
  const auto count = py::arg("count");
  const auto dtype = py::arg("dtype");
  const auto op = py::arg("op");
  const auto root = py::arg("root");
  const auto divisor = py::arg("divisor") = 0;
  const auto prescale = py::arg("prescale") = 1.0;
  const auto postscale = py::arg("postscale") = 1.0;
  const auto algorithm = py::arg("algorithm") = Algorithm::kAuto;
  const auto output_counts = py::arg("output_counts") = no_counts;
  const auto no_shape = py::arg("shape") = py::none();
  const auto no_name = py::arg("name") = "";
  const auto on_host = py::arg("place") = py::none();
  const auto timeout = py::arg("timeout_s") = 0.0;
  const auto async_op = py::arg("async_op") = false;
  py::class_<Group, std::shared_ptr<Group>>(
      module, "Group", "Ranks that make collective calls together, in the same order.")
      .def_property_readonly("rank", &Group::rank)
      .def_property_readonly("size", &Group::size)
      .def_property_readonly("ranks", &Group::ranks, "World rank of each group rank.")
      .def_property_readonly(
          "hosts", [](const Group& group) { return group.placement().hosts; },
          "Group ranks of each host: the order in which reductions fold.")
      .def_property_readonly("memory_bytes", &Group::memory_bytes,
                             "What this rank reserves for the group beside its buckets.")
      .def("all_reduce", &all_reduce, input, output, count, dtype, op, py::kw_only(), divisor,
           prescale, postscale, algorithm, no_shape, no_name, on_host, timeout, async_op)
      .def("reduce", &reduce, input, output, count, dtype, op, root, py::kw_only(), divisor,
           prescale, postscale, algorithm, no_shape, no_name, on_host, timeout, async_op)
      .def("reduce_scatter", &reduce_scatter, input, output, count, dtype, op, py::kw_only(),
           divisor, prescale, postscale, algorithm, no_shape, no_name, on_host, timeout, async_op)
      .def("broadcast", &from_root<Kind::kBroadcast>, input, output, count, dtype, root,
           py::kw_only(), no_shape, no_name, on_host, timeout, async_op)
      .def("scatter", &from_root<Kind::kScatter>, input, output, count, dtype, root, py::kw_only(),
           no_shape, no_name, on_host, timeout, async_op)
      .def("all_gather", &all_gather, input, output, count, dtype, py::kw_only(), output_counts,
           no_shape, no_name, on_host, timeout, async_op)
      .def("gather", &gather, input, output, count, dtype, root, py::kw_only(), output_counts,
           no_shape, no_name, on_host, timeout, async_op)
      .def("all_to_all", &all_to_all, input, output, count, dtype, py::kw_only(),
           py::arg("input_counts") = no_counts, output_counts, no_shape, no_name, on_host, timeout,
           async_op)
      .def("barrier", &barrier, py::kw_only(), timeout, async_op)
      .def(
          "allocate",
          [](Group& group, std::size_t nbytes) { return Buffer{group.allocate(nbytes)}; },
          py::arg("nbytes"))
      .def("duplicate",
           [](Group& group) {
             const py::gil_scoped_release no_gil;
             return group.duplicate(interrupt_check());
           })
      .def(
          "new_group",
          [](Group& group, const std::vector<int>& ranks) {
            const py::gil_scoped_release no_gil;
            return group.new_group(ranks, interrupt_check());
          },
          py::arg("ranks"),
          "The group of these of my ranks, in this order; None on the others. All of mine call.")
      .def(
          "split",
          [](Group& group, const py::object& color, const py::object& key) {
            std::optional<std::int64_t> its_color;
            if (!color.is_none()) its_color = whole_number(group, "split", "color", color);
            const std::int64_t its_key = whole_number(group, "split", "key", key);
            const py::gil_scoped_release no_gil;
            return group.split(its_color, its_key, interrupt_check());
          },
          py::arg("color"), py::arg("key") = py::int_(0),
          "One group for each color, ordered by key, then rank; None for color None.")
      .def("take_turn", &take_turn, "This thread's turn on an idle group of one host, else None.")
      .def("abort", &Group::abort, py::arg("reason"), py::call_guard<py::gil_scoped_release>());

  py::class_<HeldTurn>(module, "Turn", "Runs a group's operations in the threads that come by.")
      .def("all_reduce", &all_reduce_in_turn, input, output, count, dtype, op, py::kw_only(),
           prescale, no_shape, no_name, timeout)
      .def(
          "advance", [](HeldTurn& held) { held.turn->advance(); },
          py::call_guard<py::gil_scoped_release>(), "Go on as far as possible without waiting.")
      .def(
          "check", [](HeldTurn& held) { held.turn->check(); },
          py::call_guard<py::gil_scoped_release>(),
          "Look at deadlines and peers; what ends an operation is kept for wait().")
      .def(
          "done", [](const HeldTurn& held) { return held.turn->done(); },
          "Whether all that was started is over.")
      .def(
          "wait",
          [](HeldTurn& held) {
            const py::gil_scoped_release no_gil;
            held.turn->wait(interrupt_check());
          },
          "Block until all is over; raises what ended it.")
      .def(
          "close", [](HeldTurn& held) { held.turn.reset(); },
          py::call_guard<py::gil_scoped_release>(),
          "The group is idle again. After wait(), and the last call.");
}

}  // namespace pycomm
