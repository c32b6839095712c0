#include <pybind11/native_enum.h>

#include "bindings/bindings.h"
#include "core/dtype.h"
#include "core/operation.h"
#include "core/reduce_op.h"
#include "transport/channel.h"

namespace pycomm {

namespace py = pybind11;

void bind_types(py::module_& module) {
  py::native_enum<DType>(module, "DType", "enum.Enum")
      .value("BOOL", DType::kBool)
      .value("UINT8", DType::kUint8)
      .value("INT8", DType::kInt8)
      .value("INT16", DType::kInt16)
      .value("INT32", DType::kInt32)
      .value("INT64", DType::kInt64)
      .value("FLOAT16", DType::kFloat16)
      .value("BFLOAT16", DType::kBFloat16)
      .value("FLOAT32", DType::kFloat32)
      .value("FLOAT64", DType::kFloat64)
      .finalize();
  py::native_enum<ReduceOp>(
      module, "ReduceOp", "enum.Enum",
      "How a reduction combines two elements; AVG divides the sum once, by the "
      "number of ranks.")
      .value("SUM", ReduceOp::kSum)
      .value("AVG", ReduceOp::kAvg)
      .value("MIN", ReduceOp::kMin)
      .value("MAX", ReduceOp::kMax)
      .value("PROD", ReduceOp::kProd)
      .finalize();
  py::native_enum<Algorithm>(module, "Algorithm", "enum.Enum",
                             "Between hosts: direct exchange keeps the canonical order, the ring "
                             "folds in a rotated one.")
      .value("AUTO", Algorithm::kAuto)
      .value("DIRECT", Algorithm::kDirect)
      .value("RING", Algorithm::kRing)
      .finalize();
  py::class_<Channel, std::shared_ptr<Channel>>(
      module, "Channel", "Point-to-point messages between hosts; made by pycomm._mpi.");
}

}  // namespace pycomm
