// Shared memory between real processes: what threads cannot show.

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "transport/arena.h"
#include "transport/doorbell.h"
#include "transport/handover.h"
#include "transport/liveness.h"
#include "transport/notice.h"
#include "transport/window.h"

namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

/// A socket of somebody who has called `called`.
int call(const pycomm::Handover& called) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, called.address().data(), called.address().size());
  const int caller = socket(AF_UNIX, SOCK_STREAM, 0);
  const auto length =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + called.address().size());
  CHECK_EQUAL(connect(caller, reinterpret_cast<const sockaddr*>(&address), length), 0);
  return caller;
}

/// Two ranks' views of one group, in one process.
struct TwoRanks {
  pycomm::ProcessPage processes[2] = {};
  pycomm::GroupPage pages[2] = {};
  pycomm::Notice job;
  pycomm::Window first{view(0)};
  pycomm::Window second{view(1)};

  pycomm::Window view(int rank) {
    std::vector<pycomm::Window::Peer> peers;
    for (int peer = 0; peer < 2; ++peer) {
      peers.push_back({&processes[peer], nullptr, &pages[peer], nullptr, nullptr, nullptr, peer});
    }
    return {rank, peers, 0, job};
  }
};

}  // namespace

TEST(arena_blocks_do_not_overlap_and_come_back_zeroed) {
  const auto arena = pycomm::Arena::create(1 << 20);
  auto first = arena->allocate(5000);
  auto second = arena->allocate(1);
  CHECK_EQUAL(first->offset(), std::size_t{0});
  CHECK_EQUAL(second->offset(), std::size_t{8192});
  std::memset(first->data(), 1, first->bytes());
  first.reset();
  auto again = arena->allocate(8192);
  CHECK_EQUAL(again->offset(), std::size_t{0});
  for (std::size_t i = 0; i < again->bytes(); ++i) CHECK(again->data()[i] == std::byte{0});
}

TEST(arena_merges_freed_neighbours_and_names_its_limit) {
  const auto arena = pycomm::Arena::create(16 * 4096);
  std::vector<std::shared_ptr<pycomm::ArenaBlock>> blocks;
  for (int i = 0; i < 16; ++i) blocks.push_back(arena->allocate(4096));
  std::string text;
  try {
    arena->allocate(1);
  } catch (const pycomm::CommError& error) {
    text = error.what();
  }
  CHECK(text.find("PYCOMM_ARENA_BYTES") != std::string::npos);
  for (const int freed : {3, 5, 4}) blocks[static_cast<std::size_t>(freed)].reset();
  CHECK_EQUAL(arena->allocate(3 * 4096)->offset(), std::size_t{3 * 4096});
  CHECK_EQUAL(arena->allocated_bytes(), std::size_t{13 * 4096});
}

TEST(arena_outlives_its_owner_as_long_as_a_block_lives) {
  auto arena = pycomm::Arena::create(1 << 20);
  const auto block = arena->allocate(100);
  arena.reset();
  std::memset(block->data(), 7, block->bytes());
  CHECK(block->data()[99] == std::byte{7});
}

TEST(arena_of_a_parent_is_left_alone_by_a_forked_child) {
  const auto arena = pycomm::Arena::create(1 << 20);
  const auto block = arena->allocate(4096);
  std::memset(block->data(), 7, block->bytes());
  const pid_t child = fork();
  if (child == 0) {
    try {
      arena->allocate(4096);
      _exit(1);
    } catch (const pycomm::CommError&) {
      _exit(0);
    }
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK_EQUAL(status, 0);
  CHECK(block->data()[4095] == std::byte{7});
}

TEST(arena_cannot_be_shrunk_under_its_peers) {
  const auto arena = pycomm::Arena::create(1 << 20);
  CHECK_EQUAL(ftruncate(arena->descriptor(), 0), -1);
}

TEST(handover_maps_the_same_memory_in_another_process) {
  pycomm::Handover mine;
  int pipe_ends[2];
  CHECK_EQUAL(pipe(pipe_ends), 0);
  const std::string token = pycomm::random_hex(16);
  const pid_t child = fork();
  if (child == 0) {
    pycomm::Handover theirs;
    const auto& address = theirs.address();
    if (write(pipe_ends[1], address.data(), address.size()) < 0) _exit(2);
    const int descriptor = memfd_create("theirs", MFD_CLOEXEC);
    if (ftruncate(descriptor, 4096) != 0) _exit(3);
    auto* bytes =
        static_cast<char*>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0));
    std::strcpy(bytes, "written by the child");
    theirs.exchange(1, {mine.address(), address}, {0, 1}, token, descriptor, 10s);
    _exit(0);
  }
  std::string address(mine.address().size(), '\0');
  CHECK_EQUAL(read(pipe_ends[0], address.data(), address.size()),
              static_cast<ssize_t>(address.size()));
  const int own = memfd_create("mine", MFD_CLOEXEC);
  const auto descriptors = mine.exchange(0, {mine.address(), address}, {0, 1}, token, own, 10s);
  const auto* bytes =
      static_cast<char*>(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, descriptors[1].get(), 0));
  CHECK_EQUAL(std::string(bytes), std::string("written by the child"));
  int status = -1;
  waitpid(child, &status, 0);
  CHECK_EQUAL(status, 0);
}

// It was waited for until the deadline, and not named.
TEST(handover_names_a_rank_that_ends_in_it_at_once) {
  pycomm::Handover mine;
  int pipe_ends[2];
  CHECK_EQUAL(pipe(pipe_ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    pycomm::Handover theirs;
    const auto& address = theirs.address();
    if (write(pipe_ends[1], address.data(), address.size()) < 0) _exit(2);
    pause();
  }
  std::string address(mine.address().size(), '\0');
  CHECK_EQUAL(read(pipe_ends[0], address.data(), address.size()),
              static_cast<ssize_t>(address.size()));
  std::thread end([&] {
    std::this_thread::sleep_for(200ms);
    kill(child, SIGKILL);
  });
  // Rank 4 gives up for it: rank 7 is to be named for all that.
  pycomm::Handover witness;
  const std::vector<std::string> addresses{mine.address(), witness.address(), address};
  std::string texts[2];
  const auto exchange = [&](int local_rank, pycomm::Handover& handover) {
    try {
      handover.exchange(local_rank, addresses, {2, 4, 7}, "token", 0, 60s);
    } catch (const pycomm::PeerLostError& error) {
      texts[local_rank] = error.what();
    }
  };
  const auto began = Clock::now();
  std::thread other([&] { exchange(1, witness); });
  exchange(0, mine);
  other.join();
  end.join();
  for (const std::string& text : texts) {
    CHECK(text.find("init: rank 7 ended while") != std::string::npos);
  }
  CHECK(Clock::now() - began < 30s);
  waitpid(child, nullptr, 0);
}

TEST(handover_says_that_a_rank_gave_up_which_has_not_ended) {
  pycomm::Handover mine;
  auto theirs = std::make_unique<pycomm::Handover>();
  const std::vector<std::string> addresses{mine.address(), theirs->address()};
  std::thread other([&] {
    std::this_thread::sleep_for(200ms);
    theirs.reset();
  });
  std::string text;
  try {
    mine.exchange(0, addresses, {4, 7}, "token", 0, 60s);
  } catch (const pycomm::PeerLostError& error) {
    text = error.what();
  }
  other.join();
  CHECK(text.find("rank 7 has given up, or refuses this rank") != std::string::npos);
}

TEST(handover_can_be_interrupted) {
  pycomm::Handover mine;
  pycomm::Handover absent;
  std::string text;
  try {
    mine.exchange(0, {mine.address(), absent.address()}, {0, 1}, "token", 0, 60s,
                  [] { throw std::runtime_error("interrupted"); });
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  CHECK_EQUAL(text, std::string("interrupted"));
}

TEST(handover_refuses_a_stranger_and_names_who_did_not_come) {
  pycomm::Handover mine;
  pycomm::Handover absent;
  const int wrong = call(mine);
  const std::string guess(pycomm::Handover::kTokenLength, 'a');
  CHECK_EQUAL(send(wrong, guess.data(), guess.size(), 0), static_cast<ssize_t>(guess.size()));
  std::string text;
  try {
    mine.exchange(0, {mine.address(), absent.address()}, {4, 7}, "token", 0, 100ms);
  } catch (const pycomm::PeerLostError& error) {
    text = error.what();
  }
  close(wrong);
  CHECK(text.find("rank 7 did not come") != std::string::npos);
  CHECK(text.find("1 stranger") != std::string::npos);

  pycomm::Handover here;
  pycomm::Handover there;
  std::string told_stranger;
  std::thread stranger([&] {
    try {
      there.exchange(1, {here.address(), there.address()}, {0, 1}, "another token", 0, 2s);
    } catch (const pycomm::PeerLostError& error) {
      told_stranger = error.what();
    }
  });
  try {
    here.exchange(0, {here.address(), there.address()}, {0, 1}, "token", 0, 2s);
    text.clear();
  } catch (const pycomm::PeerLostError& error) {
    text = error.what();
  }
  stranger.join();
  // Who is refused first leaves, and may not have looked at the other's call.
  const auto is_error = [](const std::string& found, const std::string& whom) {
    return found.find(whom + " has given up, or refuses") != std::string::npos ||
           found.find(whom + " did not come") != std::string::npos;
  };
  CHECK(is_error(text, "rank 1"));
  CHECK(is_error(told_stranger, "rank 0"));
}

// The sockets lie in the abstract namespace, which any process of the machine can call.
TEST(handover_is_held_up_by_no_stranger_whatever_it_says) {
  pycomm::Handover first;
  pycomm::Handover second;
  const int silent = call(first);
  const int slow = call(first);
  CHECK_EQUAL(send(slow, "abc", 3, 0), ssize_t{3});
  const int wrong = call(first);
  const std::string guess(pycomm::Handover::kTokenLength, 'a');
  CHECK_EQUAL(send(wrong, guess.data(), guess.size(), 0), static_cast<ssize_t>(guess.size()));
  const int gone = call(first);
  close(gone);

  const std::string token = pycomm::random_hex(pycomm::Handover::kTokenLength / 2);
  const std::vector<std::string> addresses{first.address(), second.address()};
  const auto theirs = pycomm::Arena::create(1 << 20);
  const auto mine = pycomm::Arena::create(1 << 20);
  std::vector<pycomm::Descriptor> others;
  std::thread other(
      [&] { others = second.exchange(1, addresses, {0, 1}, token, theirs->descriptor(), 10s); });
  const auto began = Clock::now();
  const auto descriptors = first.exchange(0, addresses, {0, 1}, token, mine->descriptor(), 10s);
  other.join();
  CHECK(Clock::now() - began < 5s);
  CHECK(descriptors[1].get() >= 0 && others[0].get() >= 0);
  char byte = 0;
  CHECK_EQUAL(recv(wrong, &byte, 1, 0), ssize_t{0});  // it was hung up on, without a descriptor
  for (const int descriptor : {silent, slow, wrong}) close(descriptor);
}

TEST(handover_calls_nothing_that_is_no_rank) {
  CHECK(pycomm::Handover::is_address(pycomm::Handover().address()));
  for (const std::string name : {"", "pycomm-", "/run/other", "pycomm-0123456789abcdef"}) {
    CHECK(!pycomm::Handover::is_address(name));
  }
  pycomm::Handover mine;
  // Longer than the address of any socket: it was once copied over what lies behind one.
  const std::string endless(4096, 'a');
  std::string text;
  try {
    mine.exchange(0, {mine.address(), endless}, {0, 1}, "token", 0, 100ms);
  } catch (const pycomm::CommError& error) {
    text = error.what();
  }
  CHECK(text.find("no address") != std::string::npos);
}

TEST(arena_is_for_its_user_alone) {
  const auto arena = pycomm::Arena::create(1 << 20);
  struct stat file;
  CHECK_EQUAL(fstat(arena->descriptor(), &file), 0);
  CHECK_EQUAL(file.st_mode & 07777, mode_t{0600});
  CHECK_EQUAL(file.st_uid, geteuid());
}

TEST(arena_of_a_peer_is_as_long_as_it_says_and_stays_so) {
  const auto refused = [](int descriptor, std::size_t bytes) {
    try {
      pycomm::Arena::map(descriptor, bytes);
      return false;
    } catch (const pycomm::CommError&) {
      return true;
    }
  };
  const auto arena = pycomm::Arena::create(1 << 20);
  CHECK(!refused(dup(arena->descriptor()), 1 << 20));
  CHECK(refused(dup(arena->descriptor()), (1 << 20) + 4096));
  const int unsealed = memfd_create("unsealed", MFD_CLOEXEC);
  CHECK_EQUAL(ftruncate(unsealed, 1 << 20), 0);
  CHECK(refused(unsealed, 1 << 20));
}

TEST(arena_holds_what_lies_in_it_and_no_more) {
  const auto arena = pycomm::Arena::create(1 << 20);
  const std::uint64_t most = ~std::uint64_t{0};
  CHECK(arena->holds(0, 1 << 20));
  CHECK(arena->holds(1 << 20, 0));
  CHECK(!arena->holds(1, 1 << 20));
  CHECK(!arena->holds(most, 0));
  CHECK(!arena->holds(most - 4095, 4096));  // whose sum is 0
  CHECK(!arena->holds(4096, most - 4000));
}

TEST(life_word_tells_a_killed_process_within_a_second) {
  auto* word = new (mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
      pycomm::LifeWord();
  int pipe_ends[2];
  CHECK_EQUAL(pipe(pipe_ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const pycomm::LifeKeeper alive(*word);
    if (write(pipe_ends[1], "x", 1) != 1) _exit(1);
    for (;;) pause();
  }
  char byte = 0;
  CHECK_EQUAL(read(pipe_ends[0], &byte, 1), ssize_t{1});
  CHECK(!word->owner_died());
  kill(child, SIGKILL);
  const auto deadline = Clock::now() + 1s;  // the child stays a zombie meanwhile
  while (!word->owner_died() && Clock::now() < deadline) std::this_thread::yield();
  CHECK(word->owner_died());
  waitpid(child, nullptr, 0);
}

TEST(life_word_of_a_thread_that_let_go_stays_clean) {
  pycomm::LifeWord word;
  std::thread([&] { const pycomm::LifeKeeper alive(word); }).join();
  CHECK(!word.owner_died());
}

TEST(doorbell_never_loses_a_ring) {
  pycomm::Doorbell bell;
  std::atomic<int> turn = 0;
  constexpr int kTurns = 2000;
  const auto player = [&](int parity) {
    for (int i = parity; i < kTurns; i += 2) {
      while (turn.load(std::memory_order_acquire) != i) {
        const auto ticket = bell.listen();
        if (turn.load(std::memory_order_acquire) != i) {
          bell.sleep(ticket, 10s);  // a lost ring would hang the test
        }
        bell.leave();
      }
      turn.store(i + 1, std::memory_order_release);
      bell.ring();
    }
  };
  std::thread other([&] { player(1); });
  player(0);
  other.join();
  CHECK_EQUAL(turn.load(), kTurns);
}

TEST(what_was_read_in_the_arena_of_a_rank_that_failed_meanwhile_is_not_taken_for_sound) {
  // Rank 0 has completed its part, waits, fails, and its caller changes the buffer; rank 1 reads
  // that, and completes its part too.
  for (const bool ends_job : {false, true}) {
    TwoRanks ranks;
    ranks.first.complete_phase();
    (ends_job ? ranks.job : ranks.first.notice())
        .post(pycomm::NoticeKind::kPeerLost, 0, "rank 0 was interrupted");
    ranks.second.complete_phase();
    pycomm::Window::AllCompleted completed(ranks.second);
    CHECK_THROWS(completed.poll(), pycomm::PeerLostError, "rank 0 was interrupted");
  }
}

TEST(a_rank_that_has_begun_to_tell_why_it_fails_is_waited_for) {
  TwoRanks ranks;
  ranks.first.complete_phase();
  ranks.second.complete_phase();
  pycomm::Window::AllCompleted completed(ranks.second);
  auto& word = reinterpret_cast<std::atomic<std::uint32_t>&>(ranks.first.notice());
  word.store(1);  // what post() writes first
  CHECK(!completed.poll());
  CHECK_EQUAL(completed.describe(), std::string("a rank that has failed to say why"));
  word.store(0);
  CHECK(completed.poll());
}

TEST(notice_without_an_end_is_cut_off) {
  std::vector<char> bytes(sizeof(pycomm::Notice), 'x');  // nothing behind it may be read
  auto* const notice = reinterpret_cast<pycomm::Notice*>(bytes.data());
  std::string text;
  try {
    notice->raise();
  } catch (const pycomm::PeerLostError& error) {
    text = error.what();
  }
  CHECK(!text.empty());
  CHECK(text.size() < sizeof(pycomm::Notice));
}

TEST(notice_keeps_the_first_reason) {
  pycomm::Notice notice;
  CHECK(notice.post(pycomm::NoticeKind::kTimeout, 3, "first"));
  CHECK(!notice.post(pycomm::NoticeKind::kMismatch, 4, "second"));
  std::string text;
  try {
    notice.raise();
  } catch (const pycomm::CommTimeoutError& error) {
    text = error.what();
  }
  CHECK_EQUAL(text, std::string("first"));
  CHECK_EQUAL(notice.rank(), 3);
}
