// The message by which hosts open an operation. Its signatures are text for errors: all of them can
// be described, whatever they hold.

#include "collectives/extremes.h"

#include "core/error.h"
#include "parser.h"

namespace {

using pycomm::Extremes;
using pycomm::Signature;

constexpr std::size_t kSumBytes = 24;

Extremes mine() {
  pycomm::Operation operation;
  operation.kind = pycomm::Kind::kAllReduce;
  operation.count = 4096;
  operation.name = "bucket 3";
  const Signature signature = Signature::of(operation, 7, 99);
  const Extremes::Entry entry{signature.hash(), 0, signature};
  return {entry, entry};
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  Extremes known = mine();
  const std::vector<std::byte> message(reinterpret_cast<const std::byte*>(data),
                                       reinterpret_cast<const std::byte*>(data) + bytes);
  try {
    known.include_message(message, sizeof(Extremes) + kSumBytes);
    known.check();
    require(bytes == sizeof(Extremes) + kSumBytes, "what all agree on is all there");
  } catch (const pycomm::MismatchError& error) {
    require(std::strlen(error.what()) < 8192, "its text has an end");
  } catch (const pycomm::CommError&) {
  }
  return 0;
}

std::vector<std::string> seeds() {
  Extremes different = mine();
  different.highest.hash = ~std::uint64_t{0};
  different.highest.rank = 5;
  different.highest.signature.dim_count = 127;
  different.highest.signature.name.fill('x');  // without an end
  return {bytes_of(mine()) + std::string(kSumBytes, 1), bytes_of(different)};
}
