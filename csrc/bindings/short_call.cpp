#include "bindings/short_call.h"

// After Python.h, which pybind11 includes.
#include <structmember.h>

#include <cstddef>
#include <memory>
#include <utility>

#include "bindings/bindings.h"

namespace pycomm {
namespace {

namespace py = pybind11;

struct ShortCall {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* function;
  ShortWay* short_way;
  PyObject* dict;
};

ShortCall* as_short_call(PyObject* self) { return reinterpret_cast<ShortCall*>(self); }

PyObject* call(PyObject* self, PyObject* const* args, std::size_t flagged_count,
               PyObject* keywords) {
  try {
    py::object result = (*as_short_call(self)->short_way)(
        CallArguments{args, PyVectorcall_NARGS(flagged_count), keywords});
    if (result) return result.release().ptr();
  } catch (...) {
    set_python_error();
    return nullptr;
  }
  return PyObject_Vectorcall(as_short_call(self)->function, args, flagged_count, keywords);
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(as_short_call(self)->function);
  Py_VISIT(as_short_call(self)->dict);
  return 0;
}

int clear(PyObject* self) {
  // `function` stays until the end, for calls that finalizers make; the dictionary, whose
  // __wrapped__ is the function, breaks every cycle through a module.
  Py_CLEAR(as_short_call(self)->dict);
  return 0;
}

void destroy(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  Py_CLEAR(as_short_call(self)->dict);
  Py_CLEAR(as_short_call(self)->function);
  delete as_short_call(self)->short_way;
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* repr(PyObject* self) { return PyObject_Repr(as_short_call(self)->function); }

/// As an attribute of a class it becomes a method, as every function does.
PyObject* bind(PyObject* self, PyObject* object, PyObject*) {
  if (object != nullptr && object != Py_None) return PyMethod_New(self, object);
  Py_INCREF(self);
  return self;
}

/// Pickled, and copied, by name.
PyObject* reduce(PyObject* self, PyObject*) { return PyObject_GetAttrString(self, "__qualname__"); }

PyMethodDef methods[] = {{"__reduce__", &reduce, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};

PyMemberDef members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(ShortCall, vectorcall), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(ShortCall, dict), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyGetSetDef properties[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                       {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                       {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(&destroy)},
                       {Py_tp_repr, reinterpret_cast<void*>(&repr)},
                       {Py_tp_descr_get, reinterpret_cast<void*>(&bind)},
                       {Py_tp_methods, methods},
                       {Py_tp_members, members},
                       {Py_tp_getset, properties},
                       {0, nullptr}};

PyType_Spec spec = {"pycomm._core.ShortCall", sizeof(ShortCall), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                        Py_TPFLAGS_DISALLOW_INSTANTIATION,
                    slots};

}  // namespace

ShortCalls::ShortCalls() : type_(py::reinterpret_steal<py::object>(PyType_FromSpec(&spec))) {
  if (!type_) throw py::error_already_set();
}

py::object ShortCalls::make(ShortWay short_way, py::object function) const {
  auto kept = std::make_unique<ShortWay>(std::move(short_way));
  auto* const made = PyObject_GC_New(ShortCall, reinterpret_cast<PyTypeObject*>(type_.ptr()));
  if (made == nullptr) throw py::error_already_set();
  made->vectorcall = &call;
  made->function = function.release().ptr();
  made->short_way = kept.release();
  made->dict = nullptr;
  auto* const object = reinterpret_cast<PyObject*>(made);
  PyObject_GC_Track(object);
  return py::reinterpret_steal<py::object>(object);
}

}  // namespace pycomm
