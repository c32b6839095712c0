#include "kernels/checksum.h"

#include <cstdint>

#include "bindings/bindings.h"

namespace pycomm {

namespace py = pybind11;

void bind_checksum(py::module_& module) {
  module.def(
      "checksum",
      [](std::uintptr_t address, std::size_t bytes) {
        const py::gil_scoped_release no_gil;
        return checksum(reinterpret_cast<const std::byte*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "XXH64 of some bytes.");
}

}  // namespace pycomm
