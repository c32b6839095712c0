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
      .value("COMPLEX64", DType::kComplex64)
      .value("COMPLEX128", DType::kComplex128)
      .value("FLOAT8_E4M3FN", DType::kFloat8E4M3Fn)
      .value("FLOAT8_E4M3FNUZ", DType::kFloat8E4M3Fnuz)
      .value("FLOAT8_E5M2", DType::kFloat8E5M2)
      .value("FLOAT8_E5M2FNUZ", DType::kFloat8E5M2Fnuz)
      .value("FLOAT8_E8M0FNU", DType::kFloat8E8M0Fnu)
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
      .value("BAND", ReduceOp::kBand)
      .value("BOR", ReduceOp::kBor)
      .value("BXOR", ReduceOp::kBxor)
      .finalize();
  py::native_enum<Algorithm>(
      module, "Algorithm", "enum.Enum",
      "Of an all-reduce between hosts. AUTO chooses by cost among those that keep the canonical "
      "order: DIRECT and GATHER_FOLD. RING folds in a rotated one. EXACT_ORDER is AUTO where the "
      "order must not be another, on GPUs too.")
      .value("AUTO", Algorithm::kAuto)
      .value("DIRECT", Algorithm::kDirect)
      .value("RING", Algorithm::kRing)
      .value("GATHER_FOLD", Algorithm::kGatherFold)
      .value("EXACT_ORDER", Algorithm::kExactOrder)
      .finalize();
  py::class_<Channel, std::shared_ptr<Channel>>(
      module, "Channel", "Point-to-point messages between hosts; made by pycomm._mpi.");
}

}  // namespace pycomm
