// What can be told of memory by reading it once.

#include <pybind11/native_enum.h>

#include <cstdint>

#include "bindings/bindings.h"
#include "core/dtype.h"
#include "kernels/checksum.h"
#include "kernels/extent.h"

namespace pycomm {

namespace py = pybind11;

void bind_bits(py::module_& module) {
  py::native_enum<Extent>(
      module, "Extent", "enum.IntEnum",
      "Whether some floats can be summed: SUMMABLE, they and the sum of as many "
      "as there are ranks are finite; LARGE, their sum may overflow; NON_FINITE, "
      "one is NaN or infinite.")
      .value("SUMMABLE", Extent::kSummable)
      .value("LARGE", Extent::kLarge)
      .value("NON_FINITE", Extent::kNonFinite)
      .finalize();
  module.def(
      "extent",
      [](DType dtype, std::uintptr_t address, std::size_t bytes, std::size_t ranks) {
        const py::gil_scoped_release no_gil;
        return extent_of(
            largest_magnitude(dtype, reinterpret_cast<const std::byte*>(address), bytes), dtype,
            ranks);
      },
      py::arg("dtype"), py::arg("address"), py::arg("bytes"), py::arg("ranks"),
      "Of some floats, of as many ranks.");
  module.def(
      "copy_measured",
      [](DType dtype, std::uintptr_t to, std::uintptr_t from, std::size_t bytes,
         std::size_t ranks) {
        const py::gil_scoped_release no_gil;
        return extent_of(copy_measured(dtype, reinterpret_cast<std::byte*>(to),
                                       reinterpret_cast<const std::byte*>(from), bytes,
                                       /*past_caches=*/true),
                         dtype, ranks);
      },
      py::arg("dtype"), py::arg("to"), py::arg("from_"), py::arg("bytes"), py::arg("ranks"),
      "Copy some floats past the caches; their extent, of as many ranks.");
  module.def(
      "checksum",
      [](std::uintptr_t address, std::size_t bytes) {
        const py::gil_scoped_release no_gil;
        return checksum(reinterpret_cast<const std::byte*>(address), bytes);
      },
      py::arg("address"), py::arg("bytes"), "XXH64 of some bytes.");
}

}  // namespace pycomm
