#include "nccl/exchange.h"

namespace pycomm::nccl {

Exchange exchange_of(const Operation& operation, int rank, int size) {
  const std::size_t element_bytes = size_of(operation.dtype);
  const bool is_root = rank == operation.root;
  const auto in = [&](int peer) {
    return operation.input_counts.empty() ? operation.count
                                          : operation.input_counts[static_cast<std::size_t>(peer)];
  };
  const auto out = [&](int peer) {
    return operation.output_counts.empty()
               ? operation.count
               : operation.output_counts[static_cast<std::size_t>(peer)];
  };
  const bool sends_to_all = operation.kind == Kind::kAllToAll;
  const bool scatters = operation.kind == Kind::kScatter;
  const bool everyone_receives = operation.kind == Kind::kAllGather || sends_to_all;
  Exchange blocks(element_bytes);
  // From each of my blocks, or my only one, to whoever wants it.
  const std::byte* from = operation.input;
  for (int peer = 0; peer < size; ++peer) {
    if (sends_to_all || (scatters && is_root)) {
      blocks.send(peer, from, in(peer));
      from += in(peer) * element_bytes;
    } else if (!scatters && (everyone_receives || peer == operation.root)) {
      blocks.send(peer, from, operation.count);
    }
  }
  std::byte* to = operation.output;
  for (int peer = 0; peer < size; ++peer) {
    if (everyone_receives || (!scatters && is_root)) {
      blocks.receive(peer, to, out(peer));
      to += out(peer) * element_bytes;
    } else if (scatters && peer == operation.root) {
      blocks.receive(peer, to, operation.count);
    }
  }
  return blocks;
}

}  // namespace pycomm::nccl
