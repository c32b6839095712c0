#include "collectives/broadcast.h"

#include <algorithm>
#include <cstring>

#include "collectives/open.h"

namespace pycomm {
namespace {

/// Inside one host the root copies one piece in while the others copy out the one before. With half
/// the staging at once 256 KiB and 1 MiB take a fifth longer.
constexpr std::size_t kHostPieceBytes = 128 << 10;

/// One piece through the binomial tree of hosts. Hosts are counted from the root's; host v receives
/// from v minus its lowest set bit and forwards to v + every smaller power of two.
class HostTree {
 public:
  HostTree(const Context& context, int root) : context_(context), leaders_(context.lane(0)) {
    root_host_ = context.placement.host_of[static_cast<std::size_t>(root)];
    position_ = leaders_.wrap(context.host() - root_host_);
    leaders_.peers[static_cast<std::size_t>(root_host_)] = context.world_rank(root);
  }

  Task<> pass_on(std::span<std::byte> piece) const {
    const int hosts = context_.host_count();
    int bit = 1;
    while (bit < hosts && (position_ & bit) == 0) bit *= 2;
    if (position_ != 0) {
      const auto received = leaders_.receive(root_host_ + position_ - bit, piece);
      co_await until(*received);
    }
    for (bit /= 2; bit > 0; bit /= 2) {
      if (position_ + bit >= hosts) continue;
      const auto sent = leaders_.send(root_host_ + position_ + bit, piece);
      co_await until(*sent);
    }
  }

 private:
  const Context& context_;
  Lane leaders_;
  int root_host_;
  int position_;
};

Task<> broadcast_staged(Context& context, const Operation& operation) {
  const bool is_root = context.rank == operation.root;
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const auto root = static_cast<std::size_t>(operation.root);
  const bool on_root_host = context.placement.host_of[root] == context.host();
  const int leader = on_root_host ? context.placement.local_rank_of[root] : 0;
  const std::size_t half = context.window.staging_bytes() / 2;
  const std::size_t slot_bytes = context.host_count() == 1 ? std::min(half, kHostPieceBytes) : half;
  for (std::size_t begin = 0, i = 0; begin < bytes; begin += slot_bytes, ++i) {
    const std::size_t length = std::min(slot_bytes, bytes - begin);
    // A leader fills one slot while slow ranks still read the other.
    std::byte* const slot = context.window.staging(leader) + i % 2 * slot_bytes;
    if (is_root) std::memcpy(slot, operation.input + begin, length);
    if (context.host_count() > 1 && context.window.local_rank() == leader) {
      const HostTree tree(context, operation.root);
      co_await tree.pass_on({slot, length});
    }
    co_await meet(context);
    if (!is_root || operation.output != operation.input) {
      std::memcpy(operation.output + begin, slot, length);
    }
  }
}

}  // namespace

Task<> broadcast(Context& context, const Operation& operation) {
  const bool is_root = context.rank == operation.root;
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const std::uint64_t offset =
      is_root ? context.arena_offset(operation.input, bytes) : Announcement::kNotInArena;
  const bool small = context.host_count() == 1 && bytes <= Announcement::kEagerBytes;
  std::span<const std::byte> payload;
  if (small && is_root) payload = {operation.input, bytes};
  co_await open_operation(context, operation, offset, payload);
  if (bytes == 0) co_return;
  if (context.host_count() > 1) {
    co_await broadcast_staged(context, operation);
    co_return;
  }
  const int root = context.placement.local_rank_of[static_cast<std::size_t>(operation.root)];
  if (small) {
    std::memcpy(operation.output, context.window.announced_payload(root, context.sequence, bytes),
                bytes);
    co_return;
  }
  const std::byte* const in_arena = context.window.announced_buffer(root, context.sequence, bytes);
  if (in_arena != nullptr) {
    if (operation.output != in_arena) std::memcpy(operation.output, in_arena, bytes);
    co_await meet(context);  // the root may change its buffer only now
  } else {
    co_await broadcast_staged(context, operation);
  }
}

}  // namespace pycomm
