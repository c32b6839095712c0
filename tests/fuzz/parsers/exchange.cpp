// What a peer may send in the middle of a conversation: transfers are posted, and whatever frames
// the input holds arrive between them. No byte is written or read outside of what was given, and
// however it ends, every transfer is done or can be told why it is not: none is lost, which would
// be a wait without an end.

#include "point_to_point/exchange.h"

#include <algorithm>
#include <array>
#include <memory>

#include "core/error.h"
#include "parser.h"

namespace {

using pycomm::Exchange;
using pycomm::Frame;
using pycomm::Link;
using pycomm::Transfer;

constexpr std::size_t kPeerBytes = 256;

/// Frames of the input come from here, and what is sent vanishes. A small memory is shared.
class ScriptedLink : public Link {
 public:
  explicit ScriptedLink(bool shares) : memory_(shares ? kPeerBytes : 0) {}

  bool push(const Frame&, std::span<const std::byte>) override { return true; }
  const Frame* front() override {
    return has_frame_ ? reinterpret_cast<const Frame*>(frame_.data()) : nullptr;
  }
  const std::byte* payload() override { return payload_.data(); }
  std::size_t payload_room() override { return payload_.size(); }
  void pop() override { has_frame_ = false; }
  std::size_t piece_bytes() const override { return 32; }
  std::uint64_t address_for_peer(const std::byte*, std::size_t) const override {
    return memory_.empty() ? Frame::kNowhere : 0;
  }
  std::byte* memory_of_peer(std::uint64_t address, std::size_t bytes) const override {
    if (bytes > memory_.size() || address > memory_.size() - bytes) return nullptr;
    return const_cast<std::byte*>(memory_.data()) + address;
  }
  bool shares_memory() const override { return !memory_.empty(); }

  void bring(const std::array<std::byte, sizeof(Frame)>& frame, std::vector<std::byte> payload) {
    frame_ = frame;
    payload_ = std::move(payload);
    has_frame_ = true;
  }

 private:
  std::vector<std::byte> memory_;
  alignas(Frame) std::array<std::byte, sizeof(Frame)> frame_{};
  std::vector<std::byte> payload_;
  bool has_frame_ = false;
};

/// A transfer and the memory it names, as long as it says.
struct Posted {
  std::shared_ptr<Transfer> transfer = std::make_shared<Transfer>();
  std::vector<std::byte> memory;
};

Posted make_transfer(Reader& reader) {
  const auto flags = reader.take<std::uint8_t>();
  Posted posted;
  Transfer& transfer = *posted.transfer;
  transfer.direction = flags & 1 ? Transfer::Direction::kSend : Transfer::Direction::kReceive;
  transfer.in_slot = flags & 2;
  const bool any = !(flags & 1) && !transfer.in_slot && (flags & 4);
  transfer.peer = any ? Transfer::kAnySource : 1;
  transfer.device = flags & 8 ? 0 : -1;
  transfer.tag = flags >> 4 & 1;
  transfer.dtype = flags & 32 ? pycomm::DType::kFloat64 : pycomm::DType::kUint8;
  transfer.count = reader.take<std::uint8_t>();
  if (flags & 64) transfer.count *= 9;  // beyond what is sent at once
  posted.memory.resize(transfer.bytes());
  transfer.memory = posted.memory.data();
  return posted;
}

void check_none_is_lost(const Exchange& exchange, const std::vector<Posted>& all) {
  const auto unfinished = exchange.unfinished();
  for (const Posted& posted : all) {
    require(posted.transfer->done || std::find(unfinished.begin(), unfinished.end(),
                                               posted.transfer) != unfinished.end(),
            "no transfer is lost");
  }
}

/// A frame of which the input says little, so that it often fits.
std::array<std::byte, sizeof(Frame)> likely_frame(Reader& reader) {
  Frame frame;
  frame.kind = static_cast<Frame::Kind>(reader.take<std::uint8_t>() % 11);
  const auto flags = reader.take<std::uint8_t>();
  frame.eager = flags & 1;
  frame.in_slot = flags & 2;
  frame.on_gpu = flags & 8;
  frame.tag = flags >> 4 & 1;
  frame.dtype = flags & 32 ? pycomm::DType::kFloat64 : pycomm::DType::kUint8;
  frame.id = reader.take<std::uint8_t>() % 8;
  frame.count = reader.take<std::uint8_t>();
  if (flags & 64) frame.count *= 9;
  if (flags & 128) frame.address = reader.take<std::uint8_t>();
  frame.payload_bytes = frame.eager ? frame.bytes() : reader.take<std::uint8_t>();
  if (frame.kind == Frame::Kind::kMessage && !frame.eager) frame.payload_bytes = 0;
  std::array<std::byte, sizeof(Frame)> bytes;
  std::memcpy(bytes.data(), &frame, sizeof(frame));
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  Reader reader(data, bytes);
  pycomm::SelfLink self;
  ScriptedLink peer(reader.take<std::uint8_t>() & 1);
  std::vector<Posted> all;  // outlives the exchange
  Exchange exchange(0, {&self, &peer}, [](int, pycomm::nccl::HostMail&) {
    return std::unique_ptr<pycomm::nccl::GpuPair>();
  });
  try {
    while (reader.left() > 0) {
      const auto what = reader.take<std::uint8_t>();
      if (what % 3 == 0) {
        all.push_back(make_transfer(reader));
        exchange.post(all.back().transfer);
      } else {
        const auto frame = what % 3 == 1 ? likely_frame(reader)
                                         : reader.take<std::array<std::byte, sizeof(Frame)>>();
        // As long as a likely frame says, most of the time.
        std::uint64_t length = reader.take<std::uint8_t>();
        if (what % 2 == 0) std::memcpy(&length, &frame[offsetof(Frame, payload_bytes)], 8);
        auto payload = reader.take_bytes(std::min<std::uint64_t>(length, reader.left()));
        if (what % 2 == 0) payload.resize(std::min<std::uint64_t>(length, 4096));
        peer.bring(frame, std::move(payload));
      }
      if (what & 64 && !all.empty()) {
        static_cast<void>(exchange.receive_at_once(*all.back().transfer, 1));
      }
      exchange.advance();
      exchange.advance();
      check_none_is_lost(exchange, all);
    }
  } catch (const pycomm::CommError&) {
    check_none_is_lost(exchange, all);
  }
  exchange.clear();
  return 0;
}

std::vector<std::string> seeds() {
  const auto posted = [](int flags, int count) {
    return std::string{0, static_cast<char>(flags), static_cast<char>(count)};
  };
  const auto frame = [](Frame::Kind kind, int flags, int id, int count, int address = -1) {
    std::string text{4, static_cast<char>(kind), static_cast<char>(flags), static_cast<char>(id),
                     static_cast<char>(count)};
    if (address >= 0) {
      text[2] = static_cast<char>(flags | 128);
      text += static_cast<char>(address);
    }
    if (!(flags & 1)) {
      const int entries = kind == Frame::Kind::kBatch ? 8 * count : 0;
      text += static_cast<char>(kind == Frame::Kind::kData ? count : entries);
    }
    return text;
  };
  const auto shared = std::string(1, 1);
  const auto remote = std::string(1, 0);
  using Kind = Frame::Kind;
  const std::string more(1, 0);  // the length, which frames of this kind do not need
  return {
      remote + posted(0, 8) + frame(Kind::kMessage, 1, 0, 8) + more + "12345678",
      remote + frame(Kind::kMessage, 1, 0, 8) + more + "12345678" + posted(0, 8),
      remote + posted(64, 200) + frame(Kind::kMessage, 64, 0, 200) + more +
          frame(Kind::kData, 0, 0, 100) + more + std::string(100, 'x'),
      shared + posted(0, 100) + frame(Kind::kMessage, 0, 3, 100, 20) + more,
      shared + posted(64 | 1, 200) + frame(Kind::kReceived, 0, 0, 0) + more,
      remote + posted(64 | 1, 200) + frame(Kind::kRequest, 0, 0, 0) + more,
      shared + posted(1 | 2, 100) + frame(Kind::kRequest, 0, 0, 0, 8) + more,
      shared + posted(2, 100) + frame(Kind::kPlaced, 2, 0, 60) + more,
      shared + frame(Kind::kReady, 2, 5, 100, 10) + more + posted(1 | 2, 60),
      remote + posted(1, 8) + frame(Kind::kCredit, 0, 0, 1) + more,
      remote + frame(Kind::kRefused, 0, 0, 0) + more + "no",
      remote + posted(8, 8) + frame(Kind::kMessage, 8, 0, 8) + more,
      remote + posted(8 | 1, 8) + frame(Kind::kBatch, 0, 0, 1) + more + '\1' + std::string(7, 0),
  };
}
