#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "transport/channel_loopback.h"

namespace {

using pycomm::make_loopback_channels;

std::vector<std::byte> bytes_of(const std::string& text) {
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

TEST(a_receive_with_room_to_spare_says_that_it_awaits_no_exact_length) {
  auto channels = make_loopback_channels(2);
  std::vector<std::byte> room(9);
  std::size_t length = 0;
  const auto receive = channels[1]->receive_at_most(0, 3, room, length);
  CHECK_EQUAL(receive->describe(), "rank 0 to send up to 9 bytes (tag 3)");
}

TEST(a_receive_posted_before_the_send_is_over_after_it) {
  auto channels = make_loopback_channels(2);
  std::vector<std::byte> arrived(5);
  auto receive = channels[1]->receive(0, 3, arrived);
  CHECK(!receive->poll());
  CHECK_EQUAL(receive->describe(), "rank 0 to send 5 bytes (tag 3)");
  CHECK(!receive->rings_doorbell());

  CHECK(channels[0]->send(1, 3, bytes_of("hello"))->poll());
  CHECK(receive->poll());
  CHECK_EQUAL(text_of(arrived), "hello");
  CHECK(receive->poll());
}

TEST(the_buffer_of_a_finished_send_may_be_overwritten) {
  auto channels = make_loopback_channels(2);
  auto sent = bytes_of("first");
  CHECK(channels[0]->send(1, 0, sent)->poll());
  sent = bytes_of("other");
  std::vector<std::byte> arrived(5);
  CHECK(channels[1]->receive(0, 0, arrived)->poll());
  CHECK_EQUAL(text_of(arrived), "first");
}

TEST(messages_match_in_order_whatever_order_they_are_polled_in) {
  auto channels = make_loopback_channels(2);
  std::vector<std::byte> first(1), second(1), third(1);
  auto receive_first = channels[1]->receive(0, 0, first);
  auto receive_second = channels[1]->receive(0, 0, second);
  for (const char* text : {"a", "b", "c"}) channels[0]->send(1, 0, bytes_of(text));
  auto receive_third = channels[1]->receive(0, 0, third);
  CHECK(receive_third->poll() && receive_second->poll() && receive_first->poll());
  CHECK_EQUAL(text_of(first) + text_of(second) + text_of(third), "abc");
}

TEST(tags_and_senders_are_kept_apart) {
  auto channels = make_loopback_channels(3);
  channels[0]->send(2, 1, bytes_of("0/1"));
  channels[0]->send(2, 2, bytes_of("0/2"));
  channels[1]->send(2, 1, bytes_of("1/1"));
  channels[2]->send(2, 1, bytes_of("2/1"));  // to itself
  for (auto [sender, tag] : {std::pair{2, 1}, {1, 1}, {0, 2}, {0, 1}}) {
    std::vector<std::byte> arrived(3);
    CHECK(channels[2]->receive(sender, tag, arrived)->poll());
    CHECK_EQUAL(text_of(arrived), std::to_string(sender) + "/" + std::to_string(tag));
  }
}

TEST(an_empty_message_is_a_message) {
  auto channels = make_loopback_channels(2);
  auto receive = channels[1]->receive(0, 0, {});
  CHECK(!receive->poll());
  channels[0]->send(1, 0, {});
  CHECK(receive->poll());
}

TEST(another_length_is_a_mismatch_that_names_both) {
  auto channels = make_loopback_channels(2);
  for (std::size_t expected : {3, 5}) {
    channels[0]->send(1, 7, bytes_of("four"));
    std::vector<std::byte> arrived(expected);
    auto receive = channels[1]->receive(0, 7, arrived);
    CHECK_THROWS(receive->poll(), pycomm::MismatchError,
                 ("rank 0 sent 4 bytes (tag 7) where " + std::to_string(expected)).c_str());
  }
}

TEST(a_withdrawn_receive_leaves_its_message_to_the_next) {
  auto channels = make_loopback_channels(2);
  std::vector<std::byte> untouched(1), arrived(1);
  auto withdrawn = channels[1]->receive(0, 0, untouched);
  auto receive = channels[1]->receive(0, 0, arrived);
  withdrawn.reset();
  channels[0]->send(1, 0, bytes_of("x"));
  CHECK(receive->poll());
  CHECK_EQUAL(text_of(arrived), "x");
  CHECK(untouched[0] == std::byte{0});
}

TEST(messages_and_bytes_are_counted_at_the_sender) {
  auto channels = make_loopback_channels(2);
  channels[0]->send(1, 1, bytes_of("12345"));
  channels[0]->send(1, 1, {});
  channels[0]->send(1, pycomm::Channel::kControlTag, bytes_of("no data"));
  CHECK_EQUAL(channels[0]->messages_sent(), 2u);
  CHECK_EQUAL(channels[0]->bytes_sent(), 5u);
  CHECK_EQUAL(channels[1]->messages_sent(), 0u);
}

TEST(a_receive_outlives_the_channels) {
  auto channels = make_loopback_channels(2);
  std::vector<std::byte> arrived(1);
  auto receive = channels[1]->receive(0, 0, arrived);
  channels[0]->send(1, 0, bytes_of("x"));
  channels.clear();
  CHECK(receive->poll());
}

/// Every rank is a thread and sends to every rank, itself included, while it receives; run under
/// the thread sanitizer this is the test that the mailboxes are safe.
TEST(ranks_as_threads_exchange_in_all_directions) {
  constexpr int kRanks = 4;
  constexpr int kRounds = 50;
  auto channels = make_loopback_channels(kRanks);
  std::vector<std::exception_ptr> errors(kRanks);

  auto run_rank = [&](int rank) {
    auto& channel = *channels[rank];
    for (std::uint32_t round = 0; round < kRounds; ++round) {
      std::vector<std::uint32_t> received(kRanks);
      std::vector<std::unique_ptr<pycomm::Message>> messages;
      const std::uint32_t sent = 1000 * round + static_cast<std::uint32_t>(rank);
      for (int peer = 0; peer < kRanks; ++peer) {
        messages.push_back(
            channel.receive(peer, 1, std::as_writable_bytes(std::span(&received[peer], 1))));
        messages.push_back(channel.send(peer, 1, std::as_bytes(std::span(&sent, 1))));
      }
      for (auto& message : messages) {
        while (!message->poll()) std::this_thread::yield();
      }
      for (int peer = 0; peer < kRanks; ++peer) {
        CHECK_EQUAL(received[peer], 1000 * round + static_cast<std::uint32_t>(peer));
      }
    }
  };

  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        run_rank(rank);
      } catch (...) {
        errors[rank] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (auto& channel : channels) {
    CHECK_EQUAL(channel->messages_sent(), kRanks * kRounds);
    CHECK_EQUAL(channel->bytes_sent(), kRanks * kRounds * sizeof(std::uint32_t));
  }
}

}  // namespace
