#include "point_to_point/frame.h"

namespace pycomm {

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
