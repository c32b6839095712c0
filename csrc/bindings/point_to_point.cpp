#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <variant>

#include "bindings/bindings.h"
#include "bindings/call_site.h"
#include "group/group.h"

namespace pycomm {
namespace {

namespace py = pybind11;

Transfer transfer_of(Transfer::Direction direction, std::uintptr_t address, std::size_t count,
                     DType dtype, int peer, int tag, const py::object& shape, const Place& place) {
  Transfer transfer;
  transfer.direction = direction;
  transfer.peer = peer;
  transfer.tag = tag;
  transfer.dtype = dtype;
  transfer.count = count;
  transfer.memory = reinterpret_cast<std::byte*>(address);
  transfer.site = call_site();
  if (place) std::tie(transfer.device, transfer.stream) = *place;
  if (!shape.is_none()) {
    transfer.shape.count = 0;
    for (const auto& dim : py::reinterpret_borrow<py::sequence>(shape)) {
      transfer.shape.append(dim.cast<std::int64_t>());
    }
  }
  return transfer;
}

void send(Group& group, std::uintptr_t input, std::size_t count, DType dtype, int dst, int tag,
          const py::object& shape, const Place& place, double timeout_s) {
  const auto transfer =
      transfer_of(Transfer::Direction::kSend, input, count, dtype, dst, tag, shape, place);
  const py::gil_scoped_release no_gil;
  group.post_office().run(transfer, timeout_s, interrupt_check());
}

std::shared_ptr<TransferWork> isend(Group& group, std::uintptr_t input, std::size_t count,
                                    DType dtype, int dst, int tag, const py::object& shape,
                                    const Place& place, double timeout_s) {
  const auto transfer =
      transfer_of(Transfer::Direction::kSend, input, count, dtype, dst, tag, shape, place);
  const py::gil_scoped_release no_gil;
  return group.post_office().start(transfer, timeout_s);
}

int recv(Group& group, std::uintptr_t output, std::size_t count, DType dtype,
         std::optional<int> src, int tag, const py::object& shape, const Place& place,
         double timeout_s) {
  const auto transfer = transfer_of(Transfer::Direction::kReceive, output, count, dtype,
                                    src.value_or(Transfer::kAnySource), tag, shape, place);
  const py::gil_scoped_release no_gil;
  return group.post_office().run(transfer, timeout_s, interrupt_check());
}

std::shared_ptr<TransferWork> irecv(Group& group, std::uintptr_t output, std::size_t count,
                                    DType dtype, std::optional<int> src, int tag,
                                    const py::object& shape, const Place& place, double timeout_s) {
  const auto transfer = transfer_of(Transfer::Direction::kReceive, output, count, dtype,
                                    src.value_or(Transfer::kAnySource), tag, shape, place);
  const py::gil_scoped_release no_gil;
  return group.post_office().start(transfer, timeout_s);
}

std::shared_ptr<TransferWork> send_to_slot(Group& group, std::uintptr_t input, std::size_t count,
                                           int dst, int tag, std::uint64_t immediate,
                                           const Place& place, double timeout_s) {
  auto transfer = transfer_of(Transfer::Direction::kSend, input, count, DType::kUint8, dst, tag,
                              py::none(), place);
  transfer.in_slot = true;
  transfer.immediate = immediate;
  const py::gil_scoped_release no_gil;
  return group.post_office().start(transfer, timeout_s);
}

/// A slot of the host is its block in the arena; one of a GPU is an address and its bytes.
using Slot = std::variant<Buffer, std::pair<std::uintptr_t, std::size_t>>;

std::shared_ptr<TransferWork> receive_into_slot(Group& group, const Slot& slot, int src, int tag,
                                                const Place& place, double timeout_s) {
  Transfer transfer =
      transfer_of(Transfer::Direction::kReceive, 0, 0, DType::kUint8, src, tag, py::none(), place);
  transfer.in_slot = true;
  if (const auto* buffer = std::get_if<Buffer>(&slot)) {
    transfer.slot = buffer->block;
    transfer.memory = buffer->block->data();
    transfer.count = buffer->block->bytes();
  } else {
    const auto& [address, bytes] = std::get<1>(slot);
    transfer.memory = reinterpret_cast<std::byte*>(address);
    transfer.count = bytes;
  }
  const py::gil_scoped_release no_gil;
  return group.post_office().start(transfer, timeout_s);
}

void wait(Group& group, TransferWork& work) {
  const py::gil_scoped_release no_gil;
  group.post_office().wait(work, interrupt_check());
}

}  // namespace

void bind_point_to_point(py::module_& module) {
  py::class_<TransferWork, Work, std::shared_ptr<TransferWork>>(
      module, "TransferWork",
      "A message in flight. What it says of what came is valid once done().")
      .def_readonly("source", &TransferWork::source, "Who sent it.")
      .def_readonly("count", &TransferWork::count, "How many bytes came into a slot.")
      .def_readonly("immediate", &TransferWork::immediate, "The number that came with them.");

  auto group =
      py::reinterpret_borrow<py::class_<Group, std::shared_ptr<Group>>>(module.attr("Group"));
  const auto input = py::arg("input");
  const auto output = py::arg("output");
  const auto count = py::arg("count");
  const auto dtype = py::arg("dtype");
  const auto dst = py::arg("dst");
  const auto src = py::arg("src");
  const auto tag = py::arg("tag");
  const auto immediate = py::arg("immediate");
  const auto slot = py::arg("slot");
  const auto no_shape = py::arg("shape") = py::none();
  const auto on_host = py::arg("place") = py::none();
  const auto timeout = py::arg("timeout_s") = 0.0;
  group.def("send", &send, input, count, dtype, dst, tag, py::kw_only(), no_shape, on_host, timeout)
      .def("isend", &isend, input, count, dtype, dst, tag, py::kw_only(), no_shape, on_host,
           timeout)
      .def("recv", &recv, output, count, dtype, src, tag, py::kw_only(), no_shape, on_host, timeout,
           "src None takes the earliest message of any rank; returns who sent it.")
      .def("irecv", &irecv, output, count, dtype, src, tag, py::kw_only(), no_shape, on_host,
           timeout)
      .def("send_to_slot", &send_to_slot, input, count, dst, tag, immediate, py::kw_only(), on_host,
           timeout)
      .def("receive_into_slot", &receive_into_slot, slot, src, tag, py::kw_only(), on_host, timeout)
      .def("wait", &wait, py::arg("work"),
           "Wait for a message of this group; where the ranks share a host, by moving it.");
}

}  // namespace pycomm
