#pragma once

#include <pybind11/pybind11.h>

#include <functional>

namespace pycomm {

/// Arguments as CPython's vectorcall passes them: the positional ones, then those of `keywords`, a
/// tuple of names or null.
struct CallArguments {
  PyObject* const* values;
  Py_ssize_t positional;
  PyObject* keywords;

  Py_ssize_t keyword_count() const { return keywords == nullptr ? 0 : PyTuple_GET_SIZE(keywords); }
};

/// What a call returns if it can be made the short way; no object: not this one.
using ShortWay = std::function<pybind11::object(const CallArguments&)>;

/// Python functions behind a short way: a Python frame with its default arguments takes as long as
/// all the rest of a small call. A call that cannot go the short way reaches the function.
class ShortCalls {
 public:
  ShortCalls();

  /// A callable that passes for `function`; it has a __dict__, for functools.update_wrapper.
  pybind11::object make(ShortWay short_way, pybind11::object function) const;

 private:
  pybind11::object type_;
};

}  // namespace pycomm
