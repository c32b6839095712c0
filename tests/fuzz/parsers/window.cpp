// What a peer of the host writes into its page: the input is its announcement and its notice.

#include "transport/window.h"

#include <new>

#include "core/error.h"
#include "parser.h"

namespace {

using pycomm::Arena;
using pycomm::GroupPage;
using pycomm::ProcessPage;
using pycomm::Window;

constexpr std::size_t kGroupOffset =
    (sizeof(ProcessPage) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
constexpr std::size_t kArenaBytes = kGroupOffset + (1 << 16);
constexpr std::size_t kBytes = 4096;  // of the buffer

struct Rank {
  std::shared_ptr<Arena> arena = Arena::create(kArenaBytes);
  GroupPage* page() const { return reinterpret_cast<GroupPage*>(arena->base() + kGroupOffset); }
  Window::Peer peer(int rank) const {
    std::byte* const none = nullptr;
    return {
        reinterpret_cast<ProcessPage*>(arena->base()), arena.get(), page(), none, none, none, rank};
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  static const Rank ranks[2];
  for (const Rank& rank : ranks) {
    new (rank.arena->base()) ProcessPage;
    new (rank.page()) GroupPage();
  }
  Window window(0, {ranks[0].peer(0), ranks[1].peer(1)}, 0,
                reinterpret_cast<ProcessPage*>(ranks[0].arena->base())->notice);
  pycomm::Operation operation;
  operation.kind = pycomm::Kind::kBroadcast;
  operation.count = kBytes;
  window.announce(operation, 1, 0, 0);
  auto& theirs = ranks[1].page()->announcements[1];
  theirs.signature = pycomm::Signature::of(operation, 1, 0);
  theirs.hash = theirs.signature.hash();
  const std::size_t length = std::min(bytes, sizeof(theirs));
  if (length > 0) std::memcpy(static_cast<void*>(&theirs), data, length);
  theirs.sequence.store(1);
  // What follows lies over the group's notice.
  auto* const notice = reinterpret_cast<std::byte*>(&ranks[0].page()->notice);
  if (bytes > length) {
    std::memcpy(notice, data + length, std::min(bytes - length, sizeof(pycomm::Notice)));
  }
  try {
    window.check_notices();
    const std::byte* const buffer = window.announced_buffer(1, 1, kBytes);
    const std::byte* const base = ranks[1].arena->base();
    require(buffer == nullptr || (buffer >= base && buffer + kBytes <= base + kArenaBytes),
            "the buffer lies in the peer's arena");
    Window::AllAnnounced announced(window, 1, /*compare=*/true);
    require(announced.poll(), "all have announced");
  } catch (const pycomm::CommError& error) {
    require(std::strlen(error.what()) < 8192, "its text has an end");
  }
  return 0;
}

std::vector<std::string> seeds() {
  pycomm::Announcement whole{};
  const std::string all(reinterpret_cast<const char*>(&whole), sizeof(whole));
  const auto with_offset = [](std::uint64_t offset) {
    return bytes_of(std::uint64_t{1}) + bytes_of(std::uint64_t{0}) + bytes_of(offset);
  };
  return {"",
          with_offset(4096),
          with_offset(kArenaBytes - 4095),
          with_offset(~std::uint64_t{0}),
          with_offset(~std::uint64_t{0} - 4095),
          all + bytes_of(std::uint32_t{2}) + std::string(1, 2) + std::string(7, 0) +
              std::string(sizeof(pycomm::Notice), 'x')};
}
