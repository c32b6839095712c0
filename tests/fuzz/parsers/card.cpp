// What each rank says of its GPU and its NCCL.

#include "nccl/cards.h"
#include "parser.h"

using pycomm::nccl::Card;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes) {
  Reader reader(data, bytes);
  std::vector<Card> cards(2);
  for (Card& card : cards) {
    card = reader.take<Card>();
    card.end_texts();
  }
  const auto placement = pycomm::Placement::of({"host", "host"});
  require(pycomm::nccl::problem_of(cards, placement).size() < 4096, "its text has an end");
  require(pycomm::nccl::kernels_problem_of(cards).size() < 4096, "so has that of the kernels");
  pycomm::nccl::least_scratch_of(cards);
  return 0;
}

std::vector<std::string> seeds() {
  Card one;
  one.nccl_version = 22703;
  one.set_bus_id("0000:01:00.0");
  Card other = one;
  other.set_problem("no NCCL");
  return {bytes_of(one) + bytes_of(other), std::string(2 * sizeof(Card), 'x')};
}
