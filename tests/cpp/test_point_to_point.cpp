// Messages between ranks that are threads, on one pretend host or several: order, tags, sizes, and
// what ends them. Runs under the sanitizers as well, which check the rings in shared memory.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "group/group.h"
#include "ranks.h"

namespace {

using pycomm::DType;
using pycomm::Group;
using pycomm::Transfer;
using pycomm::TransferWork;
using Bytes = std::vector<std::byte>;
using Works = std::vector<std::shared_ptr<TransferWork>>;

const std::vector<std::vector<int>> kPlacements = {{0, 0}, {0, 1}, {0, 0, 1}, {0, 1, 0, 1}};
const auto kNoInterrupt = [] {};
constexpr double kSoon = 1;  // the deadline of ranks on a host that hears nothing

Transfer transfer(Transfer::Direction direction, std::byte* memory, std::size_t bytes, int peer,
                  int tag) {
  Transfer result;
  result.direction = direction;
  result.memory = memory;
  result.count = bytes;
  result.peer = peer;
  result.tag = tag;
  return result;
}

std::shared_ptr<TransferWork> isend(Group& group, Bytes& bytes, int dst, int tag = 0) {
  return group.post_office().start(
      transfer(Transfer::Direction::kSend, bytes.data(), bytes.size(), dst, tag), 0);
}
std::shared_ptr<TransferWork> irecv(Group& group, Bytes& bytes, int src, int tag = 0) {
  return group.post_office().start(
      transfer(Transfer::Direction::kReceive, bytes.data(), bytes.size(), src, tag), 0);
}
void send(Group& group, Bytes& bytes, int dst, int tag = 0, double timeout_s = 0) {
  group.post_office().run(
      transfer(Transfer::Direction::kSend, bytes.data(), bytes.size(), dst, tag), timeout_s,
      kNoInterrupt);
}
int recv(Group& group, Bytes& bytes, int src, int tag = 0, double timeout_s = 0) {
  return group.post_office().run(
      transfer(Transfer::Direction::kReceive, bytes.data(), bytes.size(), src, tag), timeout_s,
      kNoInterrupt);
}

Bytes pattern(std::size_t bytes, int seed) {
  Bytes result(bytes);
  for (std::size_t i = 0; i < bytes; ++i) {
    result[i] = static_cast<std::byte>((i * 31 + static_cast<std::size_t>(seed) * 7) >> 1);
  }
  return result;
}

void wait_all(const Works& works) {
  for (const auto& work : works) work->wait(kNoInterrupt);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(every_size_arrives_from_memory_of_any_kind) {
  constexpr std::size_t kEager = pycomm::Frame::kEagerBytes;
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const int last = group.size() - 1;
      for (const std::size_t bytes :
           {std::size_t{0}, std::size_t{1}, kEager - 1, kEager, kEager + 1, std::size_t{65536},
            std::size_t{65537}, std::size_t{1} << 20, (std::size_t{1} << 20) + 12345}) {
        for (const bool in_arena : {false, true}) {
          const auto expected = pattern(bytes, 3);
          if (group.rank() == 0) {
            auto mine = expected;
            const auto block = group.allocate(bytes + 1);
            std::copy(mine.begin(), mine.end(), block->data());
            group.post_office().run(
                transfer(Transfer::Direction::kSend, in_arena ? block->data() : mine.data(), bytes,
                         last, 1),
                0, kNoInterrupt);
          } else if (group.rank() == last) {
            Bytes got(bytes);
            CHECK_EQUAL(recv(group, got, 0, 1), 0);
            CHECK(got == expected);
          }
        }
      }
    });
  }
}

TEST(a_ring_of_messages_goes_around_every_placement) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const int p = group.size();
      const int next = (group.rank() + 1) % p;
      const int previous = (group.rank() + p - 1) % p;
      for (int round = 0; round < 20; ++round) {
        const std::size_t bytes = static_cast<std::size_t>(round) * 9973;
        auto mine = pattern(bytes, group.rank());
        Bytes got(bytes);
        const auto sent = isend(group, mine, next);
        recv(group, got, previous);
        sent->wait(kNoInterrupt);
        CHECK(got == pattern(bytes, previous));
      }
    });
  }
}

TEST(messages_of_a_tag_keep_their_order_and_tags_select) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      constexpr int kMessages = 100;  // of both tags, more than a ring or the credit holds
      const int last = group.size() - 1;
      std::vector<Bytes> messages;
      for (int i = 0; i < 2 * kMessages; ++i) {
        // small ones and large ones must not overtake each other either
        messages.push_back(pattern(i % 3 == 0 ? 3000 : 40, i));
      }
      if (group.rank() == 0) {
        Works works;
        for (int i = 0; i < 2 * kMessages; ++i) {
          works.push_back(isend(group, messages[static_cast<std::size_t>(i)], last, i % 2));
        }
        wait_all(works);
      } else if (group.rank() == last) {
        for (const int tag : {1, 0}) {
          for (int i = tag; i < 2 * kMessages; i += 2) {
            const Bytes& expected = messages[static_cast<std::size_t>(i)];
            Bytes got(expected.size());
            recv(group, got, 0, tag);
            CHECK(got == expected);
          }
        }
      }
    });
  }
}

TEST(a_thousand_sends_wait_for_a_receiver_that_takes_the_last_first) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      constexpr int kMessages = 1000;
      const int last = group.size() - 1;
      std::vector<Bytes> messages;
      for (int i = 0; i < kMessages; ++i) messages.push_back(pattern(100, i));
      if (group.rank() == 0) {
        Works works;
        for (int i = 0; i < kMessages; ++i) {
          works.push_back(isend(group, messages[static_cast<std::size_t>(i)], last, i));
        }
        wait_all(works);
      } else if (group.rank() == last) {
        for (int i = kMessages - 1; i >= 0; --i) {
          Bytes got(100);
          recv(group, got, 0, i);
          CHECK(got == messages[static_cast<std::size_t>(i)]);
        }
      }
    });
  }
}

TEST(any_source_takes_each_message_once_and_says_whose_it_was) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      for (const std::size_t bytes : {std::size_t{16}, std::size_t{200000}}) {
        constexpr int kEach = 5;
        const int tag = bytes > 16;  // a fast rank sends large ones while small ones are awaited
        if (group.rank() == 0) {
          std::vector<int> seen(static_cast<std::size_t>(group.size()), 0);
          for (int i = 0; i < kEach * (group.size() - 1); ++i) {
            Bytes got(bytes);
            const int source = recv(group, got, Transfer::kAnySource, tag);
            const int number = seen[static_cast<std::size_t>(source)]++;
            CHECK(got == pattern(bytes, 10 * source + number));
          }
          for (int rank = 1; rank < group.size(); ++rank) {
            CHECK_EQUAL(seen[static_cast<std::size_t>(rank)], kEach);
          }
        } else {
          for (int i = 0; i < kEach; ++i) {
            auto mine = pattern(bytes, 10 * group.rank() + i);
            send(group, mine, 0, tag);
          }
        }
      }
    });
  }
}

TEST(large_messages_cross_in_both_directions_at_once_in_any_order_of_calls) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const std::size_t bytes = 3 << 20;
      const int p = group.size();
      std::vector<Bytes> outgoing;
      std::vector<Bytes> incoming;
      for (int peer = 0; peer < p; ++peer) {
        outgoing.push_back(pattern(bytes, 10 * group.rank() + peer));
        incoming.emplace_back(bytes);
      }
      Works works;
      for (int i = 0; i < p; ++i) {  // itself among them
        const auto peer = static_cast<std::size_t>((group.rank() + i) % p);
        const bool send_first = (group.rank() + i) % 2 == 0;
        if (send_first) works.push_back(isend(group, outgoing[peer], static_cast<int>(peer)));
        works.push_back(irecv(group, incoming[peer], static_cast<int>(peer)));
        if (!send_first) works.push_back(isend(group, outgoing[peer], static_cast<int>(peer)));
      }
      wait_all(works);
      for (int peer = 0; peer < p; ++peer) {
        CHECK(incoming[static_cast<std::size_t>(peer)] == pattern(bytes, 10 * peer + group.rank()));
      }
    });
  }
}

TEST(messages_pass_collectives_that_wait) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      pycomm::Operation barrier;
      const int last = group.size() - 1;
      auto mine = pattern(100000, 1);
      Bytes got(100000);
      if (group.rank() == last) {
        // The others wait for this rank in the barrier, and it for their message.
        recv(group, got, 0, 9);
        CHECK(got == mine);
        group.run(barrier, kNoInterrupt);
      } else {
        const auto waiting = group.start(barrier);
        if (group.rank() == 0) send(group, mine, last, 9);
        waiting->wait(kNoInterrupt);
      }
    });
  }
}

TEST(messages_under_way_and_collectives_do_not_touch_each_others_memory) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      const int after = (group.rank() + 1) % group.size();
      const int before = (group.rank() - 1 + group.size()) % group.size();
      constexpr std::size_t kCount = 300000;  // several pieces of staging
      for (int round = 0; round < 3; ++round) {
        std::vector<Bytes> outgoing;
        std::vector<Bytes> incoming;
        for (const std::size_t bytes : {std::size_t{8}, std::size_t{1000}, std::size_t{700000}}) {
          outgoing.push_back(pattern(bytes, group.rank() + round));
          incoming.emplace_back(bytes);
        }
        Works works;
        for (auto& bytes : outgoing) works.push_back(isend(group, bytes, after, round));
        std::vector<std::int32_t> ordinary(kCount, group.rank() + 1);
        pycomm::Operation sum;
        sum.kind = pycomm::Kind::kAllReduce;
        sum.dtype = DType::kInt32;
        sum.count = kCount;
        sum.output = reinterpret_cast<std::byte*>(ordinary.data());
        sum.input = sum.output;
        group.run(sum, kNoInterrupt);
        const int p = group.size();
        CHECK(ordinary == std::vector<std::int32_t>(kCount, p * (p + 1) / 2));
        for (auto& bytes : incoming) works.push_back(irecv(group, bytes, before, round));
        group.run(sum, kNoInterrupt);
        wait_all(works);
        for (std::size_t i = 0; i < incoming.size(); ++i) {
          CHECK(incoming[i] == pattern(incoming[i].size(), before + round));
        }
      }
    });
  }
}

TEST(several_threads_of_a_rank_talk_at_once) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      if (group.rank() != 0 && group.rank() != group.size() - 1) return;
      const int peer = group.rank() == 0 ? group.size() - 1 : 0;
      std::vector<std::thread> threads;
      std::vector<std::string> errors(4);
      for (int tag = 0; tag < 4; ++tag) {
        threads.emplace_back([&, tag] {
          try {
            for (int i = 0; i < 20; ++i) {
              auto mine = pattern(static_cast<std::size_t>(i) * 5000, tag);
              Bytes got(mine.size());
              const auto sent = isend(group, mine, peer, tag);
              recv(group, got, peer, tag);
              sent->wait(kNoInterrupt);
              CHECK(got == mine);
            }
          } catch (const std::exception& error) {
            errors[static_cast<std::size_t>(tag)] = error.what();
          }
        });
      }
      for (auto& thread : threads) thread.join();
      for (const auto& error : errors) CHECK_EQUAL(error, "");
    });
  }
}

TEST(a_mismatch_names_both_ranks_and_shapes_on_both_sides) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    for (const std::size_t bytes : {std::size_t{8}, std::size_t{100000}}) {
      const auto errors = run_ranks_catching(hosts, [&](Group& group) {
        if (group.rank() == 0) {
          auto mine = pattern(bytes, 1);
          send(group, mine, 1, 5);
          Bytes answer(1);
          recv(group, answer, 1, 6);  // where a sender whose message was buffered learns of it
        } else {
          Bytes got(bytes + 1);
          recv(group, got, 0, 5);
        }
      });
      for (const auto& error : errors) {
        CHECK(contains(error, "Rank 0 sent " + std::to_string(bytes) + " uint8 with tag 5"));
        CHECK(contains(error, "rank 1 receives " + std::to_string(bytes + 1) + " uint8"));
      }
    }
  }
}

TEST(a_timeout_names_operation_peer_and_tag) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    const auto errors = run_ranks_catching(
        hosts,
        [](Group& group) {
          if (group.rank() == 0) {
            Bytes got(10);
            CHECK_THROWS(recv(group, got, 1, 7, 0.2), pycomm::CommTimeoutError,
                         "recv of 10 uint8, from rank 1, tag 7, on rank 0: timeout after");
            CHECK(group.failed());
          } else {
            std::this_thread::sleep_for(std::chrono::milliseconds(400));
          }
        },
        kSoon);
    CHECK_EQUAL(errors[0], "");
  }
}

TEST(an_abort_wakes_who_waits) {
  for (const auto& hosts : kPlacements) {
    const auto errors = run_ranks_catching(
        hosts,
        [](Group& group) {
          Bytes got(10);
          auto large = pattern(1 << 20, 0);
          if (group.rank() == 0) {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            group.abort("enough");
          } else if (group.placement().host_of[static_cast<std::size_t>(group.rank())] == 0) {
            const auto sent = isend(group, large, 0);
            CHECK_THROWS(recv(group, got, 0), pycomm::PeerLostError, "enough");
            CHECK_THROWS(sent->wait(kNoInterrupt), pycomm::PeerLostError, "enough");
          }
        },
        kSoon);
    CHECK_EQUAL(errors[0], "");
    CHECK(!contains(errors.back(), "CHECK"));  // another host hears nothing: its deadline applies
  }
}

TEST(what_is_pending_at_shutdown_says_so) {
  for (const auto& hosts : kPlacements) {
    Works pending(hosts.size());
    std::vector<Bytes> memory(hosts.size(), Bytes(10));
    run_ranks(hosts, [&](Group& group) {
      const auto rank = static_cast<std::size_t>(group.rank());
      pending[rank] = irecv(group, memory[rank], (group.rank() + 1) % group.size());
    });
    for (const auto& work : pending) {
      CHECK(work->done());
      CHECK_THROWS(work->wait(kNoInterrupt), pycomm::CommError, "abandoned");
    }
  }
}

TEST(bad_arguments_send_nothing) {
  run_ranks({0, 0}, [](Group& group) {
    Bytes bytes(1);
    CHECK_THROWS(isend(group, bytes, 2), pycomm::InvalidArgumentError, "dst is 2");
    CHECK_THROWS(isend(group, bytes, -1), pycomm::InvalidArgumentError, "dst is -1");
    CHECK_THROWS(irecv(group, bytes, 5), pycomm::InvalidArgumentError, "src is 5");
    CHECK_THROWS(isend(group, bytes, 0, -3), pycomm::InvalidArgumentError, "tag is -3");
  });
}

TEST(new_groups_talk_on_their_own) {
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [](Group& group) {
      std::vector<int> reversed;
      for (int rank = group.size() - 1; rank >= 0; --rank) reversed.push_back(rank);
      const auto other = group.new_group(reversed, kNoInterrupt);
      CHECK_EQUAL(other->rank(), group.size() - 1 - group.rank());
      const auto row = group.split(group.rank() % 2, -group.rank(), kNoInterrupt);
      for (const auto& one : {other, row}) {
        const int next = (one->rank() + 1) % one->size();
        const int previous = (one->rank() + one->size() - 1) % one->size();
        auto mine = pattern(5000, one->rank());
        Bytes got(5000);
        const auto sent = isend(*one, mine, next);
        recv(*one, got, previous);
        sent->wait(kNoInterrupt);
        CHECK(got == pattern(5000, previous));
      }
    });
  }
}

TEST(two_groups_made_at_once_in_two_threads_are_refused) {
  std::atomic<int> refused{-1};  // which of rank 0's two calls
  run_ranks({0, 0}, [&](Group& group) {
    const std::vector<std::shared_ptr<Group>> parents = {group.duplicate(kNoInterrupt),
                                                         group.duplicate(kNoInterrupt)};
    if (group.rank() == 1) {
      refused.wait(-1);  // until then rank 0's other call cannot end
      parents[1 - static_cast<std::size_t>(refused)]->duplicate(kNoInterrupt);
      return;
    }
    std::vector<std::thread> threads;
    for (int i = 0; i < 2; ++i) {
      threads.emplace_back([&, i] {
        try {
          parents[static_cast<std::size_t>(i)]->duplicate(kNoInterrupt);
        } catch (const pycomm::CommError& error) {
          if (!contains(error.what(), "rank 0 makes two groups at once")) return;
          refused = i;
          refused.notify_one();
        }
      });
    }
    for (auto& thread : threads) thread.join();
  });
  CHECK(refused >= 0);
}

namespace {

/// A receive into a slot of this rank's arena, and who owns that.
struct Slot {
  std::shared_ptr<pycomm::ArenaBlock> block;
  std::shared_ptr<TransferWork> work;

  Slot(Group& group, std::size_t bytes, int src, int tag) : block(group.allocate(bytes)) {
    post(group, src, tag);
  }
  void post(Group& group, int src, int tag) {
    Transfer receive =
        transfer(Transfer::Direction::kReceive, block->data(), block->bytes(), src, tag);
    receive.in_slot = true;
    receive.slot = block;
    work = group.post_office().start(receive, 0);
  }
  /// What came, once it has.
  Bytes taken(Group& group) const {
    group.post_office().wait(*work, kNoInterrupt);
    return {block->data(), block->data() + work->count};
  }
};

std::shared_ptr<TransferWork> send_to_slot(Group& group, Bytes& bytes, int dst, int tag,
                                           std::uint64_t immediate) {
  Transfer send = transfer(Transfer::Direction::kSend, bytes.data(), bytes.size(), dst, tag);
  send.in_slot = true;
  send.immediate = immediate;
  return group.post_office().start(send, 0);
}

/// A sender without a slot, or a receiver without a message, that comes late by a little.
void dawdle(int round, int rank) {
  if (round % 3 == rank) std::this_thread::sleep_for(std::chrono::microseconds(200));
}

}  // namespace

TEST(slots_take_shorter_messages_in_order_whoever_comes_first) {
  constexpr int kRounds = 300;
  constexpr int kSlots = 3;
  constexpr std::size_t kMost = 70000;
  const auto message = [](int round) {
    const std::size_t bytes = round % 5 == 0 ? 0 : static_cast<std::size_t>(round) * 7919 % kMost;
    return pattern(bytes, round);
  };
  for (const auto& hosts : kPlacements) {
    run_ranks(hosts, [&](Group& group) {
      const int last = group.size() - 1;
      if (group.rank() == 0) {
        std::vector<Bytes> messages;
        for (int round = 0; round < kRounds; ++round) messages.push_back(message(round));
        Works works;
        for (int round = 0; round < kRounds; ++round) {
          dawdle(round, 0);
          const auto i = static_cast<std::size_t>(round);
          works.push_back(send_to_slot(group, messages[i], last, round % 2, i + 1));
          // Now a wait that drives, now the progress thread.
          if (round % 4 == 0) group.post_office().wait(*works[i], kNoInterrupt);
        }
        wait_all(works);
      } else if (group.rank() == last) {
        std::vector<Slot> slots;
        for (int i = 0; i < 2 * kSlots; ++i) slots.emplace_back(group, kMost, 0, i % 2);
        for (int round = 0; round < kRounds; ++round) {
          dawdle(round, 1);
          Slot& slot = slots[static_cast<std::size_t>(round % (2 * kSlots))];
          const Bytes got = slot.taken(group);
          CHECK(got == message(round));
          CHECK_EQUAL(slot.work->immediate, static_cast<std::uint64_t>(round) + 1);
          if (round + 2 * kSlots < kRounds) slot.post(group, 0, round % 2);
        }
      }
    });
  }
}

TEST(what_has_no_slot_yet_does_not_overtake_what_is_being_written_to_one) {
  run_ranks({0, 0}, [](Group& group) {
    constexpr std::size_t kBytes = 3 << 20;  // takes three turns to write
    pycomm::Operation barrier;
    if (group.rank() == 0) {
      group.run(barrier, kNoInterrupt);  // the slot is ready
      auto first = pattern(kBytes, 1);
      auto second = pattern(kBytes, 2);
      const auto one = send_to_slot(group, first, 1, 0, 1);
      const auto two = send_to_slot(group, second, 1, 0, 2);
      wait_all({one, two});
    } else {
      Slot slot(group, kBytes, 0, 0);
      group.run(barrier, kNoInterrupt);
      for (const int number : {1, 2}) {
        const Bytes got = slot.taken(group);
        CHECK(got == pattern(kBytes, number));
        CHECK_EQUAL(slot.work->immediate, static_cast<std::uint64_t>(number));
        if (number == 1) slot.post(group, 0, 0);
      }
    }
  });
}

TEST(a_slot_that_is_too_small_and_a_message_that_is_not_for_a_slot_are_refused) {
  for (const std::vector<int>& hosts : {std::vector{0, 0}, std::vector{0, 1}}) {
    for (const bool too_long : {true, false}) {
      for (const bool receiver_first : {true, false}) {
        const auto errors = run_ranks_catching(
            hosts,
            [&](Group& group) {
              const auto pause = std::chrono::milliseconds(20);
              if (group.rank() == 0) {
                if (receiver_first) std::this_thread::sleep_for(pause);
                auto mine = pattern(5000, 1);
                const auto sent =
                    too_long ? send_to_slot(group, mine, 1, 4, 0) : isend(group, mine, 1, 4);
                sent->wait(kNoInterrupt);
              } else {
                if (!receiver_first) std::this_thread::sleep_for(pause);
                Slot(group, 4096, 0, 4).taken(group);
              }
            },
            kSoon);
        CHECK(contains(errors[0], "Rank 0 sent 5000 uint8"));
        CHECK(contains(errors[1], "rank 1 receives 4096 uint8, in a slot"));
      }
    }
  }
}

TEST(the_deadline_of_a_slot_counts_from_when_somebody_waits) {
  const auto errors = run_ranks_catching(
      {0, 0},
      [](Group& group) {
        if (group.rank() == 1) {
          std::this_thread::sleep_for(std::chrono::milliseconds(2500));
          return;
        }
        const Slot slot(group, 4096, 1, 7);
        std::this_thread::sleep_for(std::chrono::milliseconds(1500));
        CHECK(!slot.work->done());
        CHECK_THROWS(slot.taken(group), pycomm::CommTimeoutError,
                     "recv of 4096 uint8, in a slot, from rank 1, tag 7, on rank 0: timeout after");
      },
      kSoon);
  CHECK_EQUAL(errors[0], "");
}

TEST(what_a_sender_gave_up_while_it_was_read_is_not_received) {
  const auto errors = run_ranks_catching({0, 0}, [](Group& group) {
    static std::atomic<bool> waits;
    static std::atomic<bool> given_up;
    constexpr std::size_t kBytes = 64 << 10;
    if (group.rank() == 0) {
      waits = given_up = false;
      Bytes one(1);
      recv(group, one, 1);
      while (!waits) std::this_thread::yield();
      const auto block = group.allocate(kBytes);
      const auto work = group.post_office().start(
          transfer(Transfer::Direction::kSend, block->data(), kBytes, 1, 0), 0);
      group.abort("rank 0 gave up");
      given_up = true;
      try {
        work->wait(kNoInterrupt);  // rank 1 may have said that it has read it
      } catch (const pycomm::PeerLostError&) {
        // or this rank was first to look
      }
      return;
    }
    Bytes one(1);
    send(group, one, 0);  // it has reset both
    Bytes got(kBytes);
    bool told = false;
    const auto receive = [&] {
      // Between two looks of a receive that has begun before the sender gave up.
      group.post_office().run(transfer(Transfer::Direction::kReceive, got.data(), kBytes, 0, 0), 0,
                              [&] {
                                if (std::exchange(told, true)) return;
                                waits = true;
                                while (!given_up) std::this_thread::yield();
                              });
    };
    CHECK_THROWS(receive(), pycomm::PeerLostError, "rank 0 gave up");
  });
  for (const auto& error : errors) CHECK_EQUAL(error, std::string());
}
