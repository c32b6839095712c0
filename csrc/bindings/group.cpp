#include "group/group.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "bindings/bindings.h"

namespace pycomm {
namespace {

namespace py = pybind11;

std::byte* pointer(std::uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

/// What all collectives have in common.
struct Call {
  Group& group;
  Operation operation;

  Call(Group& group, Kind kind, const py::object& shape, std::string&& name, double timeout_s)
      : group(group) {
    operation.kind = kind;
    operation.name = std::move(name);
    operation.timeout_s = timeout_s;
    if (shape.is_none()) return;
    const auto dims = py::reinterpret_borrow<py::sequence>(shape);
    operation.shape.count = 0;
    for (const auto& dim : dims) operation.shape.append(dim.cast<std::int64_t>());
  }

  std::shared_ptr<Work> issue(bool async_op) {
    const py::gil_scoped_release no_gil;
    if (async_op) return group.start(std::move(operation));
    group.run(std::move(operation), interrupt_check());
    return nullptr;
  }
};

std::shared_ptr<Work> all_reduce(Group& group, std::uintptr_t input, std::uintptr_t output,
                                 std::size_t count, DType dtype, ReduceOp op, std::int64_t divisor,
                                 const py::object& shape, std::string name, Algorithm algorithm,
                                 double timeout_s, bool async_op) {
  Call call(group, Kind::kAllReduce, shape, std::move(name), timeout_s);
  call.operation.input = pointer(input);
  call.operation.output = pointer(output);
  call.operation.count = count;
  call.operation.dtype = dtype;
  call.operation.op = op;
  call.operation.divisor = divisor;
  call.operation.algorithm = algorithm;
  return call.issue(async_op);
}

std::shared_ptr<Work> broadcast(Group& group, std::uintptr_t data, std::size_t count, DType dtype,
                                int root, const py::object& shape, std::string name,
                                double timeout_s, bool async_op) {
  Call call(group, Kind::kBroadcast, shape, std::move(name), timeout_s);
  call.operation.input = pointer(data);
  call.operation.output = pointer(data);
  call.operation.count = count;
  call.operation.dtype = dtype;
  call.operation.root = root;
  return call.issue(async_op);
}

std::shared_ptr<Work> all_gather(Group& group, std::uintptr_t input, std::uintptr_t output,
                                 std::size_t count, DType dtype, const py::object& shape,
                                 std::string name, double timeout_s, bool async_op) {
  Call call(group, Kind::kAllGather, shape, std::move(name), timeout_s);
  call.operation.input = pointer(input);
  call.operation.output = pointer(output);
  call.operation.count = count;
  call.operation.dtype = dtype;
  return call.issue(async_op);
}

std::shared_ptr<Work> barrier(Group& group, double timeout_s, bool async_op) {
  return Call(group, Kind::kBarrier, py::none(), "", timeout_s).issue(async_op);
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

  const auto no_shape = py::arg("shape") = py::none();
  const auto no_name = py::arg("name") = "";
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
      .def("all_reduce", &all_reduce, py::arg("input"), py::arg("output"), py::arg("count"),
           py::arg("dtype"), py::arg("op"), py::kw_only(), py::arg("divisor") = 0, no_shape,
           no_name, py::arg("algorithm") = Algorithm::kAuto, timeout, async_op)
      .def("broadcast", &broadcast, py::arg("data"), py::arg("count"), py::arg("dtype"),
           py::arg("root"), py::kw_only(), no_shape, no_name, timeout, async_op)
      .def("all_gather", &all_gather, py::arg("input"), py::arg("output"), py::arg("count"),
           py::arg("dtype"), py::kw_only(), no_shape, no_name, timeout, async_op)
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
      .def("abort", &Group::abort, py::arg("reason"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace pycomm
