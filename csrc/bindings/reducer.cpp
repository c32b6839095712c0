#include "reducer/reducer.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/error.h"
#include "reducer/bucket_plan.h"
#include "reducer/gpu_buckets.h"
#include "reducer/host_buckets.h"

namespace pycomm {

namespace py = pybind11;

namespace {

std::vector<ParameterSpec> specs_of(const std::vector<DType>& dtypes,
                                    const std::vector<std::size_t>& counts) {
  if (dtypes.size() != counts.size()) {
    throw InvalidArgumentError("plan_buckets: " + std::to_string(dtypes.size()) + " dtypes and " +
                               std::to_string(counts.size()) +
                               " counts. Give one of each a parameter.");
  }
  std::vector<ParameterSpec> specs;
  for (std::size_t i = 0; i < dtypes.size(); ++i) specs.push_back({dtypes[i], counts[i]});
  return specs;
}

std::shared_ptr<Reducer> make_reducer(
    std::shared_ptr<Group> group, const std::vector<std::string>& names,
    const std::vector<DType>& dtypes, const std::vector<std::size_t>& counts,
    const std::vector<std::uint32_t>& expected_firings, std::vector<Bucket> buckets,
    std::shared_ptr<BucketStore> store, bool overlap, Algorithm algorithm) {
  const auto specs = specs_of(dtypes, counts);
  std::vector<Reducer::Parameter> parameters;
  for (std::size_t i = 0; i < specs.size(); ++i) {
    parameters.push_back({names.at(i), specs[i], expected_firings.at(i)});
  }
  const auto destroy = [](Reducer* reducer) {
    const py::gil_scoped_release no_gil;  // it may wait for buckets in flight
    delete reducer;
  };
  return {new Reducer(std::move(group), std::move(parameters), std::move(buckets), std::move(store),
                      overlap, algorithm),
          destroy};
}

/// What Python calls a bucket's exchange: launch(bucket, divisor, name) and finish(bucket).
using PythonExchange =
    std::pair<std::function<std::shared_ptr<Work>(std::size_t, std::int64_t, const std::string&)>,
              std::function<void(std::size_t)>>;

std::optional<BucketExchange> exchange_of(std::optional<PythonExchange> functions) {
  if (!functions) return std::nullopt;
  return BucketExchange{
      [launch = std::move(functions->first)](std::size_t bucket, const Operation& operation) {
        const std::int64_t divisor = operation.op == ReduceOp::kAvg ? operation.divisor : 1;
        return launch(bucket, divisor, operation.name);
      },
      std::move(functions->second)};
}

std::shared_ptr<HostBuckets> make_host_buckets(std::shared_ptr<Group> group,
                                               const std::vector<Bucket>& buckets,
                                               const std::vector<std::size_t>& counts,
                                               std::optional<PythonExchange> exchange,
                                               bool measures) {
  return std::make_shared<HostBuckets>(std::move(group), buckets, counts,
                                       exchange_of(std::move(exchange)), measures);
}

std::shared_ptr<GpuBuckets> make_gpu_buckets(std::shared_ptr<Group> group,
                                             const std::vector<Bucket>& buckets,
                                             const std::vector<std::size_t>& counts, int device,
                                             StreamAddress stream,
                                             std::optional<PythonExchange> exchange) {
  auto functions = exchange_of(std::move(exchange));
  const py::gil_scoped_release no_gil;
  return std::make_shared<GpuBuckets>(std::move(group), buckets, counts, device, stream,
                                      interrupt_check(), std::move(functions));
}

std::uintptr_t address_of(const DeviceMemory& memory) {
  return reinterpret_cast<std::uintptr_t>(memory.data());
}

void wait(Reducer& reducer, StreamAddress stream) {
  const py::gil_scoped_release no_gil;
  reducer.wait(interrupt_check(), stream);
}

}  // namespace

void bind_reducer(py::module_& module) {
  py::class_<Bucket>(module, "Bucket")
      .def_readonly("dtype", &Bucket::dtype)
      .def_readonly("parameters", &Bucket::parameters)
      .def_readonly("offsets", &Bucket::offsets)
      .def_readonly("flags_offset", &Bucket::flags_offset)
      .def_readonly("count", &Bucket::count);

  module.def(
      "plan_buckets",
      [](const std::vector<DType>& dtypes, const std::vector<std::size_t>& counts,
         const std::vector<std::size_t>& order, std::size_t bucket_cap_bytes,
         std::size_t first_bucket_cap_bytes) {
        return plan_buckets(specs_of(dtypes, counts), order, bucket_cap_bytes,
                            first_bucket_cap_bytes);
      },
      py::arg("dtypes"), py::arg("counts"), py::arg("order"), py::arg("bucket_cap_bytes"),
      py::arg("first_bucket_cap_bytes"));

  const auto exchange = py::arg("exchange") = py::none();
  py::class_<BucketStore, std::shared_ptr<BucketStore>>(module, "BucketStore",
                                                        "The memory of a reducer's buckets.");
  py::class_<HostBuckets, BucketStore, std::shared_ptr<HostBuckets>>(
      module, "HostBuckets", "Buckets in this rank's arena.")
      .def(py::init(&make_host_buckets), py::arg("group"), py::arg("buckets"), py::arg("counts"),
           exchange, py::arg("measures") = false)
      .def("worst", &HostBuckets::worst, py::call_guard<py::gil_scoped_release>())
      .def("brought", &HostBuckets::brought)
      .def("extent", &HostBuckets::extent, py::arg("parameter"))
      .def(
          "memory",
          [](const HostBuckets& store, std::size_t bucket) { return Buffer{store.memory(bucket)}; },
          py::arg("bucket"));

  py::class_<DeviceMemory, std::shared_ptr<DeviceMemory>>(
      module, "DeviceMemory",
      "Memory on a GPU, with the __cuda_array_interface__ of an array of bytes.")
      .def_property_readonly("device", &DeviceMemory::device)
      .def_property_readonly("address", &address_of)
      .def("__len__", &DeviceMemory::bytes)
      .def_property_readonly("__cuda_array_interface__", [](const DeviceMemory& memory) {
        // Version 3 of the interface; without a stream there is nothing for the consumer to wait
        // for.
        py::dict interface;
        interface["shape"] = py::make_tuple(memory.bytes());
        interface["typestr"] = "|u1";
        interface["data"] = py::make_tuple(address_of(memory), /*read_only=*/false);
        interface["strides"] = py::none();
        interface["stream"] = py::none();
        interface["version"] = 3;
        return interface;
      });
  py::class_<GpuBuckets, BucketStore, std::shared_ptr<GpuBuckets>>(
      module, "GpuBuckets", "Buckets on a GPU, zeroed on `stream`. Collective.")
      .def(py::init(&make_gpu_buckets), py::arg("group"), py::arg("buckets"), py::arg("counts"),
           py::arg("device"), py::arg("stream"), exchange)
      .def("memory", &GpuBuckets::memory, py::arg("bucket"));

  const auto stream = py::arg("stream") = 0;
  // Only wait() and the destructor block. The rest keeps the GIL: it counts and queues, and
  // ready() may fold its share of a bucket, a fraction of a millisecond.
  py::class_<Reducer, std::shared_ptr<Reducer>>(module, "Reducer")
      .def(py::init(&make_reducer), py::arg("group"), py::kw_only(), py::arg("names"),
           py::arg("dtypes"), py::arg("counts"), py::arg("expected_firings"), py::arg("buckets"),
           py::arg("store"), py::arg("overlap"), py::arg("algorithm") = Algorithm::kAuto)
      .def_property_readonly("buckets", &Reducer::buckets)
      .def_property_readonly("launched", &Reducer::launched)
      .def("begin", &Reducer::begin, py::arg("op"), py::arg("divisor"), py::arg("label"))
      .def(
          "fill",
          [](Reducer& reducer, std::size_t parameter, std::uintptr_t gradient,
             StreamAddress stream) {
            reducer.fill(parameter, reinterpret_cast<const std::byte*>(gradient), stream);
          },
          py::arg("parameter"), py::arg("gradient"), stream)
      .def("ready", &Reducer::ready, py::arg("parameter"), stream)
      .def("hold", &Reducer::hold, py::arg("parameter"))
      .def("unfired", &Reducer::unfired)
      .def("finish", &Reducer::finish, stream)
      .def("wait", &wait, stream)
      .def("used", &Reducer::used, py::arg("parameter"));
}

}  // namespace pycomm
