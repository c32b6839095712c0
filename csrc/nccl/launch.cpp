#include "nccl/launch.h"

#include <array>
#include <cstddef>
#include <numeric>
#include <optional>

#include "core/error.h"
#include "kernels/fold.h"
#include "nccl/exact_order.h"
#include "nccl/nccl_carrier.h"

namespace pycomm::nccl {
namespace {

/// How NCCL is told to reduce elements of `dtype`; `units` of its own make one of ours.
struct Reducible {
  ncclDataType_t type;
  std::size_t units = 1;
};

std::optional<Reducible> reducible(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kUint8:
      return Reducible{ncclUint8};
    case DType::kInt8:
      return Reducible{ncclInt8};
    case DType::kInt32:
      return Reducible{ncclInt32};
    case DType::kInt64:
      return Reducible{ncclInt64};
    case DType::kFloat16:
      return Reducible{ncclFloat16};
    case DType::kBFloat16:
      return Reducible{ncclBfloat16};
    case DType::kFloat32:
      return Reducible{ncclFloat32};
    case DType::kFloat64:
      return Reducible{ncclFloat64};
    case DType::kComplex64:
      return Reducible{ncclFloat32, 2};
    case DType::kComplex128:
      return Reducible{ncclFloat64, 2};
    default:
      return std::nullopt;
  }
}

std::optional<ncclRedOp_t> op_of(ReduceOp op, DType dtype) {
  const bool truth = dtype == DType::kBool;  // a byte of 0 or 1: "or" is the larger, "and" the less
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return truth ? ncclMax : ncclSum;
    case ReduceOp::kMax:
      return ncclMax;
    case ReduceOp::kMin:
      return ncclMin;
    case ReduceOp::kProd:
      return truth ? ncclMin : ncclProd;
    case ReduceOp::kBor:
      return truth ? std::optional(ncclMax) : std::nullopt;
    case ReduceOp::kBand:
      return truth ? std::optional(ncclMin) : std::nullopt;
    case ReduceOp::kBxor:
      return std::nullopt;
  }
  return std::nullopt;
}

/// What each input is multiplied by: a sum of scaled inputs is the scaled sum.
double factor_of(const Operation& operation) {
  const double divisor = operation.divisor > 1 ? static_cast<double>(operation.divisor) : 1;
  return operation.prescale * operation.postscale / divisor;
}

/// An operator that multiplies by a factor before it sums, for as long as it lives.
class ScaledSum {
 public:
  ScaledSum(const Communicator& communicator, double factor, DType dtype)
      : communicator_(communicator), nccl_(*communicator.device().nccl) {
    const DType real = dtype == DType::kComplex64    ? DType::kFloat32
                       : dtype == DType::kComplex128 ? DType::kFloat64
                                                     : dtype;
    const float single = static_cast<float>(factor);
    const void* scalar = real == DType::kFloat64 ? static_cast<const void*>(&factor) : &single;
    std::array<std::byte, 2> half;
    if (size_of(real) == half.size()) {
      const auto* const source = reinterpret_cast<const std::byte*>(&single);
      fold({DType::kFloat32, real}, half.data(), {&source, 1}, 1);
      scalar = half.data();
    }
    communicator_.check(
        nccl_.ncclRedOpCreatePreMulSum(&op, const_cast<void*>(scalar), reducible(real)->type,
                                       ncclScalarHostImmediate, communicator_.handle()),
        "ncclRedOpCreatePreMulSum");
  }
  /// Calls that were made with it keep what they need.
  ~ScaledSum() { nccl_.ncclRedOpDestroy(op, communicator_.handle()); }
  ScaledSum(const ScaledSum&) = delete;
  ScaledSum& operator=(const ScaledSum&) = delete;

  ncclRedOp_t op;

 private:
  const Communicator& communicator_;
  const NcclTable& nccl_;
};

void reduce(const Communicator& communicator, const Operation& operation) {
  const NcclTable& nccl = *communicator.device().nccl;
  const cudaStream_t stream = communicator.device().stream;
  const Reducible element = *reducible(operation.dtype);
  const std::size_t count = operation.count * element.units;
  std::optional<ScaledSum> scaled;
  const double factor = factor_of(operation);
  if (factor != 1) scaled.emplace(communicator, factor, operation.dtype);
  const ncclRedOp_t op = scaled ? scaled->op : *op_of(operation.op, operation.dtype);
  switch (operation.kind) {
    case Kind::kAllReduce:
      return communicator.check(nccl.ncclAllReduce(operation.input, operation.output, count,
                                                   element.type, op, communicator.handle(), stream),
                                "ncclAllReduce");
    case Kind::kReduce:
      return communicator.check(
          nccl.ncclReduce(operation.input, operation.output, count, element.type, op,
                          operation.root, communicator.handle(), stream),
          "ncclReduce");
    default:
      return communicator.check(
          nccl.ncclReduceScatter(operation.input, operation.output, count, element.type, op,
                                 communicator.handle(), stream),
          "ncclReduceScatter");
  }
}

}  // namespace

std::string unsupported(const Operation& operation) {
  if (needs_exact_order(operation)) return "";
  if (!reduces(operation.kind)) return "";
  if (!reducible(operation.dtype)) {
    return std::string("NCCL cannot reduce ") + name_of(operation.dtype) +
           ".\n  Convert the tensor (t.int() for int16), or pass t.cpu().";
  }
  if (!op_of(operation.op, operation.dtype)) {
    return std::string("NCCL has no ") + name_of(operation.op) + " for " +
           name_of(operation.dtype) + ".\n  Pass t.cpu().";
  }
  if (factor_of(operation) != 1 && op_of(operation.op, operation.dtype) != ncclSum) {
    return std::string("NCCL scales sums only, and op is ") + name_of(operation.op) +
           ".\n  Leave prescale and postscale at 1, and multiply the tensor.";
  }
  return "";
}

void launch(const Communicator& communicator, const Operation& operation, int rank, int size) {
  const NcclTable& nccl = *communicator.device().nccl;
  const cudaStream_t stream = communicator.device().stream;
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  switch (operation.kind) {
    case Kind::kAllReduce:
    case Kind::kReduce:
    case Kind::kReduceScatter:
      return reduce(communicator, operation);
    case Kind::kBroadcast:
      return communicator.check(
          nccl.ncclBroadcast(operation.input, operation.output, bytes, ncclUint8, operation.root,
                             communicator.handle(), stream),
          "ncclBroadcast");
    case Kind::kAllGather:
      if (!operation.output_counts.empty()) break;
      return communicator.check(nccl.ncclAllGather(operation.input, operation.output, bytes,
                                                   ncclUint8, communicator.handle(), stream),
                                "ncclAllGather");
    default:
      break;
  }
  launch(communicator, exchange_of(operation, rank, size));
}

void launch(const Communicator& communicator, const std::vector<GpuMessage>& batch, int peer) {
  Exchange messages;
  for (const GpuMessage& message : batch) {
    if (message.sends) {
      messages.send(peer, message.memory, message.bytes);
    } else {
      messages.receive(peer, message.memory, message.bytes);
    }
  }
  launch(communicator, messages);
}

}  // namespace pycomm::nccl
