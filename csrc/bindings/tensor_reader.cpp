#include "bindings/tensor_reader.h"

#include <utility>

namespace pycomm {
namespace {

namespace py = pybind11;

std::optional<DType> dtype_of(const dlpack::Tensor& tensor) {
  const auto [code, bits, lanes] = tensor.dtype;
  if (lanes != 1) return std::nullopt;
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
      return std::nullopt;
  }
}

/// The number of elements; nothing if they do not lie in row-major order.
std::optional<std::size_t> count_of(const dlpack::Tensor& tensor) {
  std::int64_t expected = 1;
  for (int i = tensor.dim_count; i-- > 0;) {
    if (tensor.strides != nullptr && tensor.dims[i] != 1 && tensor.strides[i] != expected) {
      return std::nullopt;
    }
    expected *= tensor.dims[i];
  }
  return static_cast<std::size_t>(expected);
}

}  // namespace

Shape OrdinaryTensor::shape() const {
  Shape shape;
  shape.count = 0;
  for (const std::int64_t dim : dims) shape.append(dim);
  return shape;
}

TensorReader::TensorReader(const py::type& tensor_type, py::object is_neg,
                           py::object increment_version)
    : tensor_type_(tensor_type),
      is_neg_(std::move(is_neg)),
      increment_version_(std::move(increment_version)),
      requires_grad_(
          py::reinterpret_steal<py::object>(PyUnicode_InternFromString("requires_grad"))) {
  // torch has it since 2.10.
  const py::object capsule = py::getattr(tensor_type, dlpack::kExchangeAttribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeCapsule)) return;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeCapsule));
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api != nullptr) read_ = api->tensor_from_py_object_no_sync;
}

std::optional<OrdinaryTensor> TensorReader::read(py::handle t) const {
  if (read_ == nullptr || Py_TYPE(t.ptr()) != reinterpret_cast<PyTypeObject*>(tensor_type_.ptr())) {
    return std::nullopt;
  }
  const auto requires_grad =
      py::reinterpret_steal<py::object>(PyObject_GetAttr(t.ptr(), requires_grad_.ptr()));
  if (!requires_grad) throw py::error_already_set();
  if (requires_grad.ptr() != Py_False) return std::nullopt;
  dlpack::Tensor tensor;
  if (read_(t.ptr(), &tensor) != 0) {
    PyErr_Clear();  // sparse, on a device of which DLPack does not know, ...
    return std::nullopt;
  }
  const auto dtype = dtype_of(tensor);
  const auto count = count_of(tensor);
  if (tensor.device_type != dlpack::kCpu || !dtype || !count || *count == 0 ||
      tensor.data == nullptr) {
    return std::nullopt;
  }
  // A view of a conjugate's imaginary part stores the opposite of its values.
  if (is_scalable(*dtype)) {
    const auto is_neg =
        py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), t.ptr()));
    if (!is_neg) throw py::error_already_set();
    if (is_neg.ptr() != Py_False) return std::nullopt;
  }
  return OrdinaryTensor{*dtype,
                        static_cast<std::byte*>(tensor.data) + tensor.byte_offset,
                        *count,
                        {tensor.dims, static_cast<std::size_t>(tensor.dim_count)}};
}

void TensorReader::note_change(py::handle t) const {
  const auto tensors = py::reinterpret_steal<py::object>(PyTuple_Pack(1, t.ptr()));
  if (!tensors) throw py::error_already_set();
  const auto none = py::reinterpret_steal<py::object>(
      PyObject_CallOneArg(increment_version_.ptr(), tensors.ptr()));
  if (!none) throw py::error_already_set();
}

}  // namespace pycomm
