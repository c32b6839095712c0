#include "point_to_point/transfer.h"

namespace pycomm {

Frame Transfer::frame(Frame::Kind kind) const {
  Frame frame;
  frame.kind = kind;
  frame.dtype = dtype;
  frame.dim_count = static_cast<std::int8_t>(shape.count);
  frame.on_gpu = device >= 0;
  frame.tag = tag;
  frame.id = id;
  frame.count = count;
  frame.dims = shape.dims;
  frame.in_slot = in_slot;
  frame.immediate = immediate;
  return frame;
}

bool Transfer::takes(const Frame& message) const {
  if (!in_slot) return frame(Frame::Kind::kMessage).same_elements(message);
  return message.in_slot && message.on_gpu == (device >= 0) && message.dtype == dtype &&
         message.count <= count;
}

void Transfer::got(int source, const Frame& message) {
  peer = source;
  if (!in_slot) return;
  count = message.count;
  immediate = message.immediate;
}

std::string Transfer::describe() const {
  const bool sends = direction == Direction::kSend;
  return std::string(sends ? "send of " : "recv of ") + frame(Frame::Kind::kMessage).elements() +
         (sends ? ", to " : ", from ") +
         (peer == kAnySource ? "any rank" : "rank " + std::to_string(peer)) + ", tag " +
         std::to_string(tag);
}

}  // namespace pycomm
