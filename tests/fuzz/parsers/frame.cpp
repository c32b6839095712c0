// The checks of a frame alone: what they let through cannot make arithmetic overflow.

#include "point_to_point/frame.h"

#include "parser.h"

using pycomm::Frame;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  Reader reader(data, bytes);
  const std::size_t room = reader.take<std::uint16_t>();
  const auto raw = reader.take<std::array<std::byte, sizeof(Frame)>>();
  if (Frame::problem(raw.data(), room) != nullptr) return 0;
  Frame frame;
  std::memcpy(&frame, raw.data(), sizeof(frame));
  require(frame.payload_bytes <= room, "the payload has come");
  require(frame.bytes() / pycomm::size_of(frame.dtype) == frame.count, "the bytes are a number");
  if (frame.kind == Frame::Kind::kMessage && frame.eager) {
    require(frame.payload_bytes == frame.bytes(), "an eager message is all there");
  }
  require(frame.same_elements(frame), "a frame is as itself");
  require(!frame.elements().empty(), "a frame can be described");
  return 0;
}

std::vector<std::string> seeds() {
  std::vector<std::string> all;
  for (int kind = 0; kind <= static_cast<int>(Frame::Kind::kPlaced); ++kind) {
    Frame frame;
    frame.kind = static_cast<Frame::Kind>(kind);
    frame.dtype = pycomm::DType::kFloat32;
    frame.count = 4;
    frame.dim_count = 1;
    frame.dims[0] = 4;
    frame.eager = frame.kind == Frame::Kind::kMessage;
    if (frame.eager || kind == static_cast<int>(Frame::Kind::kData)) frame.payload_bytes = 16;
    if (frame.kind == Frame::Kind::kBatch) frame.payload_bytes = 32;
    all.push_back(bytes_of(std::uint16_t{64}) + bytes_of(frame));
  }
  return all;
}
