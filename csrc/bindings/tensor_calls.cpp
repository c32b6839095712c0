#include "bindings/bindings.h"
// After Python.h, which bindings.h includes.
#include <structmember.h>

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <utility>

#include "bindings/dlpack.h"
#include "group/group.h"

namespace pycomm {
namespace {

namespace py = pybind11;

/// DType::kBool stands for all that an in-place reduction does not take this way.
DType reducible_dtype(const dlpack::Tensor& tensor) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes != 1) return DType::kBool;
  switch (code << 8 | bits) {
    case dlpack::kUint << 8 | 8:
      return DType::kUint8;
    case dlpack::kInt << 8 | 8:
      return DType::kInt8;
    case dlpack::kInt << 8 | 16:
      return DType::kInt16;
    case dlpack::kInt << 8 | 32:
      return DType::kInt32;
    case dlpack::kInt << 8 | 64:
      return DType::kInt64;
    case dlpack::kFloat << 8 | 16:
      return DType::kFloat16;
    case dlpack::kBfloat << 8 | 16:
      return DType::kBFloat16;
    case dlpack::kFloat << 8 | 32:
      return DType::kFloat32;
    case dlpack::kFloat << 8 | 64:
      return DType::kFloat64;
    default:
      return DType::kBool;
  }
}

/// Sets shape and count of `operation`. False: the elements do not lie in row-major order, or there
/// are none.
bool set_shape(Operation& operation, const dlpack::Tensor& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.dim_count; i-- > 0;) {
    if (tensor.strides != nullptr && tensor.dims[i] != 1 && tensor.strides[i] != expected) {
      return false;
    }
    expected *= tensor.dims[i];
  }
  operation.count = static_cast<std::size_t>(expected);
  operation.shape.count = 0;
  for (int i = 0; i < tensor.dim_count; ++i) operation.shape.append(tensor.dims[i]);
  return expected > 0;
}

/// Collectives on tensors that need no preparation, in one call from Python to the core: asking a
/// torch.Tensor from Python for what the core must know of it takes longer than a small collective,
/// and pybind11's dispatch nearly as long. Knows of torch only what Python hands it.
///
/// Each call returns false, having done nothing, unless all is ordinary. The caller then goes the
/// long way, which knows every case and raises every error.
class TensorCalls {
 public:
  TensorCalls(const py::type& tensor_type, py::object is_neg, py::object increment_version)
      : tensor_type_(tensor_type),
        is_neg_(std::move(is_neg)),
        increment_version_(std::move(increment_version)),
        requires_grad_(
            py::reinterpret_steal<py::object>(PyUnicode_InternFromString("requires_grad"))) {
    constexpr std::array kNames = {"SUM", "AVG", "MIN", "MAX", "PROD", "BAND", "BOR", "BXOR"};
    const py::object ops = py::type::of(py::cast(ReduceOp::kSum));
    for (std::size_t i = 0; i < kNames.size(); ++i) ops_[i] = ops.attr(kNames[i]);
    // torch has it since 2.10.
    const py::object capsule = py::getattr(tensor_type, dlpack::kExchangeAttribute, py::none());
    if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeCapsule)) return;
    const auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
    while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
    if (api != nullptr) read_ = api->tensor_from_py_object_no_sync;
  }

  /// All-reduce `input` into `output`, which may be the same tensor.
  bool all_reduce(Group& group, py::handle input, py::handle output, py::handle op) const {
    Operation operation;
    operation.kind = Kind::kAllReduce;
    if (!find_op(op, operation.op) || !set_memory(operation, input)) return false;
    if (!output.is(input)) {
      Operation written;
      written.op = operation.op;
      if (!set_memory(written, output) || written.dtype != operation.dtype ||
          written.shape.count != operation.shape.count ||
          written.shape.dims != operation.shape.dims) {
        return false;
      }
      operation.output = written.output;
    }
    // The lock is kept while the operation may end at once: giving it back and taking it again
    // costs as much as a cache line's way.
    std::optional<py::gil_scoped_release> no_gil;
    group.run(std::move(operation), interrupt_check(), [&no_gil] { no_gil.emplace(); });
    no_gil.reset();
    note_change(output);
    return true;
  }

  /// The group that a call without one means; null: this process is no rank.
  const std::shared_ptr<Group>& world() const { return world_; }
  void set_world(std::shared_ptr<Group> world) { world_ = std::move(world); }

  /// ReduceOp.SUM.
  py::handle sum() const { return ops_[static_cast<std::size_t>(ReduceOp::kSum)]; }

 private:
  bool find_op(py::handle op, ReduceOp& found) const {
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      if (!ops_[i].is(op)) continue;
      found = static_cast<ReduceOp>(i);
      return true;
    }
    return false;
  }

  /// False unless `t` is a torch.Tensor itself (no subclass, which may mean anything) of numbers
  /// that lie in row-major order in this process's memory, and autograd does not follow it.
  bool set_memory(Operation& operation, py::handle t) const {
    if (read_ == nullptr || Py_TYPE(t.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr()))
      return false;
    const auto requires_grad =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(t.ptr(), requires_grad_.ptr()));
    if (!requires_grad) throw py::error_already_set();
    if (requires_grad.ptr() != Py_False) return false;
    dlpack::Tensor tensor;
    if (read_(t.ptr(), &tensor) != 0) {
      PyErr_Clear();  // sparse, on a device of which DLPack does not know, ...
      return false;
    }
    operation.dtype = reducible_dtype(tensor);
    if (tensor.device_type != dlpack::kCpu || operation.dtype == DType::kBool ||
        !can_reduce(operation.dtype, operation.op) || tensor.data == nullptr ||
        !set_shape(operation, tensor)) {
      return false;
    }
    // A view of a conjugate's imaginary part stores the opposite of its values.
    if (is_scalable(operation.dtype)) {
      const auto is_neg =
          py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), t.ptr()));
      if (!is_neg) throw py::error_already_set();
      if (is_neg.ptr() != Py_False) return false;
    }
    operation.output = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
    operation.input = operation.output;
    return true;
  }

  /// Autograd must know that `t` is no longer what it may have saved.
  void note_change(py::handle t) const {
    const auto tensors = py::reinterpret_steal<py::object>(PyTuple_Pack(1, t.ptr()));
    if (!tensors) throw py::error_already_set();
    const auto none = py::reinterpret_steal<py::object>(
        PyObject_CallOneArg(increment_version_.ptr(), tensors.ptr()));
    if (!none) throw py::error_already_set();
  }

  const py::object tensor_type_;
  const py::object is_neg_;
  const py::object increment_version_;
  const py::object requires_grad_;
  std::array<py::object, 8> ops_;  // by ReduceOp
  int (*read_)(void*, dlpack::Tensor*) = nullptr;
  std::shared_ptr<Group> world_;  // under Python's lock
};

constexpr const char* kCapsule = "pycomm.TensorCalls";

/// all_reduce(group, input, output, op) -> bool, as CPython calls it; `self` is the TensorCalls.
PyObject* call_all_reduce(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    const auto* calls = static_cast<const TensorCalls*>(PyCapsule_GetPointer(self, kCapsule));
    if (calls == nullptr) return nullptr;
    if (count != 4) {
      PyErr_SetString(PyExc_TypeError, "all_reduce(group, input, output, op) takes four arguments");
      return nullptr;
    }
    py::detail::make_caster<Group> group;
    if (!group.load(args[0], /*convert=*/false)) Py_RETURN_FALSE;
    return py::bool_(calls->all_reduce(group, args[1], args[2], args[3])).release().ptr();
  } catch (...) {
    set_python_error();
    return nullptr;
  }
}

PyMethodDef all_reduce_method = {
    "all_reduce", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_all_reduce)),
    METH_FASTCALL,
    "all_reduce(group, input, output, op) -> bool: all-reduce input into output, which may be the "
    "same tensor; False, having done nothing, if one of them is not of the ordinary kind."};

/// A Python function (t, op=SUM, *, ...) that all-reduces in place, behind a short way for calls
/// that pass no keyword: a Python frame with its default arguments takes as long as the rest of a
/// small call. It has a __dict__, for functools.update_wrapper.
struct InPlaceFunction {
  PyObject_HEAD vectorcallfunc vectorcall;
  PyObject* function;
  PyObject* calls;  // the capsule
  PyObject* dict;
};

PyObject* call_in_place(PyObject* self, PyObject* const* args, std::size_t flagged_count,
                        PyObject* keywords) {
  const auto* in_place = reinterpret_cast<InPlaceFunction*>(self);
  const Py_ssize_t count = PyVectorcall_NARGS(flagged_count);
  if (keywords == nullptr && (count == 1 || count == 2)) {
    try {
      const auto* calls =
          static_cast<const TensorCalls*>(PyCapsule_GetPointer(in_place->calls, kCapsule));
      if (calls == nullptr) return nullptr;
      const py::handle op = count == 2 ? py::handle(args[1]) : calls->sum();
      // A copy: while this call waits, another thread may shut down.
      const std::shared_ptr<Group> world = calls->world();
      if (world && calls->all_reduce(*world, args[0], args[0], op)) Py_RETURN_NONE;
    } catch (...) {
      set_python_error();
      return nullptr;
    }
  }
  return PyObject_Vectorcall(in_place->function, args, flagged_count, keywords);
}

int traverse_in_place(PyObject* self, visitproc visit, void* arg) {
  const auto* in_place = reinterpret_cast<InPlaceFunction*>(self);
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(in_place->function);
  Py_VISIT(in_place->calls);
  Py_VISIT(in_place->dict);
  return 0;
}

int clear_in_place(PyObject* self) {
  // `function` and `calls` stay until the end, for calls that finalizers make; the dictionary,
  // whose __wrapped__ is the function, breaks every cycle through a module.
  Py_CLEAR(reinterpret_cast<InPlaceFunction*>(self)->dict);
  return 0;
}

void free_in_place(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  auto* in_place = reinterpret_cast<InPlaceFunction*>(self);
  Py_CLEAR(in_place->dict);
  Py_CLEAR(in_place->function);
  Py_CLEAR(in_place->calls);
  type->tp_free(self);
  Py_DECREF(type);
}

PyObject* repr_in_place(PyObject* self) {
  return PyObject_Repr(reinterpret_cast<InPlaceFunction*>(self)->function);
}

/// As an attribute of a class it becomes a method, as every function does.
PyObject* bind_in_place(PyObject* self, PyObject* object, PyObject*) {
  if (object != nullptr && object != Py_None) return PyMethod_New(self, object);
  Py_INCREF(self);
  return self;
}

/// Pickled, and copied, by name.
PyObject* reduce_in_place(PyObject* self, PyObject*) {
  return PyObject_GetAttrString(self, "__qualname__");
}

PyMethodDef in_place_methods[] = {{"__reduce__", &reduce_in_place, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};

PyMemberDef in_place_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(InPlaceFunction, vectorcall), READONLY, nullptr},
    {"__dictoffset__", T_PYSSIZET, offsetof(InPlaceFunction, dict), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr}};

PyGetSetDef in_place_properties[] = {
    {"__dict__", PyObject_GenericGetDict, PyObject_GenericSetDict, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot in_place_slots[] = {{Py_tp_call, reinterpret_cast<void*>(&PyVectorcall_Call)},
                                {Py_tp_traverse, reinterpret_cast<void*>(&traverse_in_place)},
                                {Py_tp_clear, reinterpret_cast<void*>(&clear_in_place)},
                                {Py_tp_dealloc, reinterpret_cast<void*>(&free_in_place)},
                                {Py_tp_repr, reinterpret_cast<void*>(&repr_in_place)},
                                {Py_tp_descr_get, reinterpret_cast<void*>(&bind_in_place)},
                                {Py_tp_methods, in_place_methods},
                                {Py_tp_members, in_place_members},
                                {Py_tp_getset, in_place_properties},
                                {0, nullptr}};

PyType_Spec in_place_spec = {"pycomm._core.InPlaceFunction", sizeof(InPlaceFunction), 0,
                             Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL |
                                 Py_TPFLAGS_DISALLOW_INSTANTIATION,
                             in_place_slots};

py::object make_in_place(const py::object& type, const py::capsule& calls, py::object function) {
  auto* const made = PyObject_GC_New(InPlaceFunction, reinterpret_cast<PyTypeObject*>(type.ptr()));
  if (made == nullptr) throw py::error_already_set();
  made->vectorcall = &call_in_place;
  made->function = function.release().ptr();
  made->calls = calls.inc_ref().ptr();
  made->dict = nullptr;
  auto* const object = reinterpret_cast<PyObject*>(made);
  PyObject_GC_Track(object);
  return py::reinterpret_steal<py::object>(object);
}

}  // namespace

void bind_tensor_calls(py::module_& module) {
  module.def(
      "tensor_calls",
      [](const py::type& tensor_type, py::object is_neg, py::object increment_version) {
        const py::capsule calls(
            new TensorCalls(tensor_type, std::move(is_neg), std::move(increment_version)), kCapsule,
            [](PyObject* capsule) {
              delete static_cast<TensorCalls*>(PyCapsule_GetPointer(capsule, kCapsule));
            });
        const auto type = py::reinterpret_steal<py::object>(PyType_FromSpec(&in_place_spec));
        if (!type) throw py::error_already_set();
        auto all_reduce =
            py::reinterpret_steal<py::object>(PyCFunction_New(&all_reduce_method, calls.ptr()));
        if (!all_reduce) throw py::error_already_set();
        return py::make_tuple(std::move(all_reduce),
                              py::cpp_function([calls, type](py::object function) {
                                return make_in_place(type, calls, std::move(function));
                              }),
                              py::cpp_function([calls](std::shared_ptr<Group> world) {
                                calls.get_pointer<TensorCalls>()->set_world(std::move(world));
                              }));
      },
      py::arg("tensor_type"), py::arg("is_neg"), py::arg("increment_version"),
      "Three functions: all_reduce(group, input, output, op) does in one call what ordinary "
      "tensors "
      "need, and returns False, having done nothing, for all others; in_place(function) puts that "
      "before a function (t, op) without a group; set_world(group) says which group that means.");
}

}  // namespace pycomm
