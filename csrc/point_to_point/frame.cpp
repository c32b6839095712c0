#include "point_to_point/frame.h"

#include <cstring>
#include <type_traits>

namespace pycomm {
namespace {

/// Whatever the dtype, so many elements have a number of bytes.
constexpr std::uint64_t kMostElements = ~std::uint64_t{0} / 16;

template <typename T>
T read(const std::byte* bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes + offset, sizeof(value));
  return value;
}

}  // namespace

static_assert(std::is_trivially_copyable_v<Frame>, "it travels as bytes");

const char* Frame::problem(const std::byte* bytes, std::size_t room) {
  const auto byte = [&](std::size_t offset) { return read<std::uint8_t>(bytes, offset); };
  const std::uint8_t raw_kind = byte(offsetof(Frame, kind));
  if (raw_kind > static_cast<std::uint8_t>(Kind::kPlaced)) return "its kind is unknown";
  const auto kind = static_cast<Kind>(raw_kind);
  const std::size_t element = size_of(static_cast<DType>(byte(offsetof(Frame, dtype))));
  if (element == 0) return "its dtype is unknown";
  const std::uint8_t eager = byte(offsetof(Frame, eager));
  if ((eager | byte(offsetof(Frame, on_gpu)) | byte(offsetof(Frame, in_slot))) > 1) {
    return "a flag is neither 0 nor 1";
  }
  const auto count = read<std::uint64_t>(bytes, offsetof(Frame, count));
  if (count > kMostElements) return "its count is too large for any memory";
  const auto payload_bytes = read<std::uint64_t>(bytes, offsetof(Frame, payload_bytes));
  if (payload_bytes > room) return "its payload is longer than what came";
  if (kind == Kind::kMessage && payload_bytes != (eager != 0 ? count * element : 0)) {
    return "its payload is not as long as its elements";
  }
  if (kind == Kind::kBatch && count > payload_bytes / sizeof(std::uint64_t)) {
    return "it has fewer entries than it says";
  }
  return nullptr;
}

std::string Frame::elements() const {
  std::string text = std::to_string(count) + " " + name_of(dtype);
  const std::string where =
      std::string(in_slot ? ", in a slot" : "") + (on_gpu ? ", on a GPU" : "");
  if (dim_count < 0) return text + where;
  text += ", shape (";
  for (int dim = 0; dim < dim_count && dim < Shape::kMaxDims; ++dim) {
    if (dim > 0) text += ", ";
    const bool hashed = dim_count > Shape::kMaxDims && dim == Shape::kMaxDims - 1;
    text += hashed ? "..." : std::to_string(dims[static_cast<std::size_t>(dim)]);
  }
  return text + (dim_count == 1 ? ",)" : ")") + where;
}

}  // namespace pycomm
