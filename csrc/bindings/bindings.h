#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <utility>

#include "core/device_call.h"
#include "group/work.h"
#include "transport/arena.h"

namespace pycomm {

/// A block of the arena as Python sees it; the tensors made from it keep it alive.
struct Buffer {
  std::shared_ptr<ArenaBlock> block;
};

/// A GPU and the stream on which it is called; none: the host.
using Place = std::optional<std::pair<int, StreamAddress>>;

// Each adds one class, or family of classes, to the module.
void bind_types(pybind11::module_& module);
void bind_errors();
void bind_work(pybind11::module_& module);
void bind_group(pybind11::module_& module);
void bind_cost(pybind11::module_& module);
void bind_tensor_calls(pybind11::module_& module);
void bind_point_to_point(pybind11::module_& module);
void bind_gpu(pybind11::module_& module);
void bind_limits(pybind11::module_& module);
void bind_world(pybind11::module_& module);
void bind_reducer(pybind11::module_& module);
void bind_trace(pybind11::module_& module);
void bind_watchdog(pybind11::module_& module);
void bind_bits(pybind11::module_& module);
void bind_process_end(pybind11::module_& module);

/// Turns the exception being handled into a Python error, in functions that pybind11 does not wrap.
void set_python_error();

/// Whether Python was told of an error that finishes a group, since the last forget_failures().
bool told_of_failure();
void forget_failures();

/// Lets Python handle pending signals; throws what a handler raised (KeyboardInterrupt). For waits
/// without the GIL. Cheap in threads that never handle signals.
void check_python_signals();

/// The check above where it can work, for calls made from Python.
InterruptCheck interrupt_check();

}  // namespace pycomm
