// What a rank says of itself when the world is made.

#include "group/introduction.h"

#include "core/error.h"
#include "parser.h"
#include "transport/arena.h"
#include "transport/handover.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  const std::string text(reinterpret_cast<const char*>(data), bytes);
  try {
    const auto taken = pycomm::Introduction::decode(text, 3);
    require(pycomm::Handover::is_address(taken.address), "it can be called");
    require(taken.token.size() == pycomm::Handover::kTokenLength, "its token is one");
    require(taken.arena_bytes % pycomm::Arena::kAlignment == 0, "its memory is whole pages");
    require(pycomm::Introduction::decode(taken.encode(), 3).encode() == taken.encode(),
            "it says what it was told");
  } catch (const pycomm::CommError& error) {
    require(std::strstr(error.what(), "rank 3") != nullptr, "the error names the rank");
  }
  return 0;
}

std::vector<std::string> seeds() {
  pycomm::Introduction made{"pycomm-" + std::string(32, '0'), 1 << 20, std::string(32, 'a'),
                            "host"};
  std::vector<std::string> all{made.encode()};
  made.host_key = "a name\nof two lines";
  made.arena_bytes = std::size_t{1} << 62;
  all.push_back(made.encode());
  return all;
}
