#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "bindings/dlpack.h"
#include "core/dtype.h"
#include "core/operation.h"

namespace pycomm {

/// Numbers in row-major order in this process's memory, which autograd does not follow. Never
/// empty.
struct OrdinaryTensor {
  DType dtype;
  std::byte* data;
  std::size_t count;
  std::span<const std::int64_t> dims;  // valid as long as the tensor is not touched

  std::size_t bytes() const { return count * size_of(dtype); }
  bool overlaps(const OrdinaryTensor& other) const {
    return data < other.data + other.bytes() && other.data < data + bytes();
  }
  Shape shape() const;
};

/// Reads torch tensors where they lie. Asking one from Python for what the core must know of it
/// takes longer than a small collective. Knows of torch only what Python hands it.
class TensorReader {
 public:
  /// @param tensor_type        torch.Tensor.
  /// @param is_neg             torch.Tensor.is_neg.
  /// @param increment_version  takes a tuple of tensors.
  TensorReader(const pybind11::type& tensor_type, pybind11::object is_neg,
               pybind11::object increment_version);

  /// Nothing unless `t` is a torch.Tensor itself (a subclass may mean anything) and ordinary, of
  /// integers or floats that can be reduced.
  std::optional<OrdinaryTensor> read(pybind11::handle t) const;

  /// Autograd must know that `t` is no longer what it may have saved.
  void note_change(pybind11::handle t) const;

 private:
  const pybind11::object tensor_type_;
  const pybind11::object is_neg_;
  const pybind11::object increment_version_;
  const pybind11::object requires_grad_;
  int (*read_)(void*, dlpack::Tensor*) = nullptr;
};

}  // namespace pycomm
