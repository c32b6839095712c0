#include "collectives/extremes.h"

#include <cstring>
#include <string>

#include "core/error.h"

namespace pycomm {

void Extremes::include_message(std::span<const std::byte> message, std::size_t expected_bytes) {
  Extremes incoming;
  const bool whole = message.size() >= sizeof(incoming);
  if (whole) {
    std::memcpy(&incoming, message.data(), sizeof(incoming));
    include(incoming.lowest);
    include(incoming.highest);
  }
  // Who knows of a difference sends just that.
  if (!whole || (agree() && message.size() != expected_bytes)) {
    throw CommError("all hosts must run the same version of pycomm: an opening message has " +
                    std::to_string(message.size()) + " bytes instead of " +
                    std::to_string(expected_bytes) + ".");
  }
}

void Extremes::check() const {
  if (agree()) return;
  throw MismatchError(describe_mismatch(static_cast<int>(lowest.rank), lowest.signature,
                                        static_cast<int>(highest.rank), highest.signature));
}

}  // namespace pycomm
