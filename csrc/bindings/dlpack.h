#pragma once

#include <cstdint>

/// As much of DLPack 1.x (https://dmlc.github.io/dlpack/latest/c_api.html) as it takes to read a
/// tensor where it lies. The layouts are an ABI, so they cannot change within the major version.
namespace pycomm::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;
/// The capsule that a tensor type has as attribute `kExchangeAttribute`.
inline constexpr const char* kExchangeAttribute = "__dlpack_c_exchange_api__";
inline constexpr const char* kExchangeCapsule = "dlpack_exchange_api";

inline constexpr std::int32_t kCpu = 1;
enum TypeCode : std::uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t dim_count;
  struct {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* dims;
  std::int64_t* strides;  // in elements; null: row-major
  std::uint64_t byte_offset;
};

/// What the capsule points to.
struct ExchangeApi {
  struct {
    std::uint32_t major;
    std::uint32_t minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  /// Fills a Tensor that is valid as long as the object is unchanged; 0, or -1 and a Python error.
  /// May be null.
  int (*tensor_from_py_object_no_sync)(void* object, Tensor* out);
  void* current_work_stream;
};

}  // namespace pycomm::dlpack
