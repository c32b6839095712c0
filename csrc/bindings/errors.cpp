#include <string_view>

#include "bindings/bindings.h"
#include "core/error.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// The classes are Python's (pycomm.errors), so that users can read and document them; they are
/// looked up when an error is thrown, which is rare.
void raise_as(const char* name, const CommError& error) {
  const py::object type = py::module_::import("pycomm.errors").attr(name);
  // A text may have been cut within a character.
  const std::string_view text = error.what();
  const auto decoded = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<py::ssize_t>(text.size()), "replace"));
  PyErr_SetObject(type.ptr(), decoded.ptr());
}

/// With Python's lock.
bool told = false;

void raise_failure_as(const char* name, const CommError& error) {
  told = true;
  raise_as(name, error);
}

/// Sets the Python error for one of ours; throws what is not.
void translate(const std::exception_ptr& pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const InvalidArgumentError& error) {
    raise_as("InvalidArgumentError", error);
  } catch (const MismatchError& error) {
    raise_failure_as("MismatchError", error);
  } catch (const CommTimeoutError& error) {
    raise_failure_as("CommTimeoutError", error);
  } catch (const PeerLostError& error) {
    raise_failure_as("PeerLostError", error);
  } catch (const CommError& error) {
    raise_failure_as("CommError", error);
  }
}

}  // namespace

void bind_errors() {
  py::register_exception_translator([](std::exception_ptr pointer) { translate(pointer); });
}

bool told_of_failure() { return told; }

void forget_failures() { told = false; }

void set_python_error() {
  try {
    translate(std::current_exception());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

}  // namespace pycomm
