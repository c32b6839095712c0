#include "nccl/staged_pair.h"

#include <algorithm>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "core/error.h"
#include "nccl/drain.h"
#include "nccl/in_flight.h"
#include "nccl/slots.h"

namespace pycomm::nccl {
namespace {

std::shared_ptr<Call> call_of(const GpuMessage& message) {
  return std::static_pointer_cast<Call>(message.call);
}

class StagedPair final : public GpuPair {
 public:
  StagedPair(std::shared_ptr<Device> device, const Pairing& pairing)
      : device_(std::move(device)), pairing_(pairing) {}
  ~StagedPair() override;

  std::vector<std::byte> propose() override { return {}; }
  Task<> launch(std::vector<GpuMessage> batch, std::vector<std::byte> theirs) override;
  bool in_flight() const override { return !in_flight_.empty(); }
  std::string describe() const override { return in_flight_.describe(); }
  void poll() override { in_flight_.poll(); }
  void abort() override;

 private:
  struct Piece {
    const GpuMessage* message;
    std::size_t begin;
    std::size_t bytes;
    std::shared_ptr<Wait> mailed;  // once the host's message was begun

    bool is_first() const { return begin == 0; }
    bool is_last() const { return begin + bytes == message->bytes; }
  };
  /// A message of no bytes has a piece of none.
  std::vector<Piece> cut(const std::vector<GpuMessage>& batch) const;

  Task<> carry(const std::vector<GpuMessage>& batch);
  /// Fill a piece's slot, or have it filled.
  void begin(Piece& piece, std::size_t number);
  /// The rest.
  Task<> finish(Piece& piece, std::size_t number);
  void copy_own(const std::vector<GpuMessage>& batch);

  const std::shared_ptr<Device> device_;
  const Pairing pairing_;
  std::unique_ptr<Slots> slots_;  // from the first batch on
  std::shared_ptr<Call> last_received_;
  InFlight in_flight_;
  bool aborted_ = false;
};

Task<> StagedPair::launch(std::vector<GpuMessage> batch, std::vector<std::byte>) {
  if (slots_ == nullptr) slots_ = Slots::on_host(device_, pairing_.arena, pairing_.slot_bytes);
  // What an earlier batch has brought may be sent by this one.
  if (last_received_ != nullptr) slots_->follow(*last_received_);
  if (pairing_.rank == pairing_.peer) {
    copy_own(batch);
  } else {
    co_await carry(batch);
  }
  for (GpuMessage& message : batch) {
    if (!message.sends) last_received_ = call_of(message);
    in_flight_.add(call_of(message), std::move(message.description), message.began,
                   message.timeout_s);
  }
}

std::vector<StagedPair::Piece> StagedPair::cut(const std::vector<GpuMessage>& batch) const {
  std::vector<Piece> pieces;
  for (const GpuMessage& message : batch) {
    std::size_t begin = 0;
    do {
      const std::size_t bytes = std::min(pairing_.slot_bytes, message.bytes - begin);
      pieces.push_back({&message, begin, bytes, nullptr});
      begin += bytes;
    } while (begin < message.bytes);
  }
  return pieces;
}

Task<> StagedPair::carry(const std::vector<GpuMessage>& batch) {
  std::vector<Piece> pieces = cut(batch);
  std::size_t begun = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    for (; begun < std::min(pieces.size(), i + Slots::kCount); ++begun) {
      if (begun >= Slots::kCount) co_await until(*pieces[begun - Slots::kCount].mailed);
      Passed emptied = slots_->emptied(begun);
      co_await until(emptied);
      begin(pieces[begun], begun);
    }
    co_await finish(pieces[i], i);
  }
  for (const Piece& piece : pieces) co_await until(*piece.mailed);
}

void StagedPair::begin(Piece& piece, std::size_t number) {
  const GpuMessage& message = *piece.message;
  std::byte* const slot = slots_->of(number);
  if (!message.sends) {
    if (piece.is_first()) call_of(message)->begin_on(slots_->up());
    piece.mailed = pairing_.mail.receive({slot, piece.bytes});
    return;
  }
  if (piece.is_first()) call_of(message)->begin_on(slots_->down());
  const Pieces::Copy copy{message.memory + piece.begin, slot, piece.bytes};
  if (piece.bytes > 0) slots_->copy_down({&copy, 1}, number);
  if (piece.is_last()) call_of(message)->end_on(slots_->down());
}

Task<> StagedPair::finish(Piece& piece, std::size_t number) {
  const GpuMessage& message = *piece.message;
  std::byte* const slot = slots_->of(number);
  if (message.sends) {
    Passed filled = slots_->filled(number);
    co_await until(filled);
    piece.mailed = pairing_.mail.send({slot, piece.bytes});
    co_return;
  }
  co_await until(*piece.mailed);
  const Pieces::Copy copy{slot, message.memory + piece.begin, piece.bytes};
  if (piece.bytes > 0) slots_->copy_up({&copy, 1}, number);
  if (piece.is_last()) call_of(message)->end_on(slots_->up());
}

void StagedPair::copy_own(const std::vector<GpuMessage>& batch) {
  const Device::Current current(*device_);
  std::deque<const GpuMessage*> sent;
  for (const GpuMessage& message : batch) {
    call_of(message)->begin_on(slots_->up());
    if (message.sends) {
      sent.push_back(&message);
      continue;
    }
    if (message.bytes > 0) {
      device_->cuda.check(
          device_->cuda.cudaMemcpyAsync(message.memory, sent.front()->memory, message.bytes,
                                        cudaMemcpyDeviceToDevice, slots_->up()),
          "cudaMemcpyAsync");
    }
    sent.pop_front();
  }
  for (const GpuMessage& message : batch) call_of(message)->end_on(slots_->up());
}

void StagedPair::abort() {
  aborted_ = true;
  in_flight_.clear();
}

StagedPair::~StagedPair() {
  try {
    drain(*this);
  } catch (const CommError&) {
    abort();
  }
  Slots::leave(std::move(slots_), aborted_);
}

}  // namespace

std::unique_ptr<GpuPair> make_staged_pair(std::shared_ptr<Device> device, const Pairing& pairing) {
  return std::make_unique<StagedPair>(std::move(device), pairing);
}

}  // namespace pycomm::nccl
