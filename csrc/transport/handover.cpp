#include "transport/handover.h"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>

#include "core/error.h"
#include "core/system_error.h"

namespace pycomm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const char* kRemedy = "Unix sockets must work between the ranks of a host.";

/// The abstract namespace: the first byte of the path is 0, the length ends the name.
std::pair<sockaddr_un, socklen_t> socket_address(const std::string& name) {
  if (!Handover::is_address(name)) throw CommError("init: '" + name + "' is no address of a rank.");
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  return {address, static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())};
}

/// What opens a hand-over: the proof that the caller belongs to this job.
struct Hello {
  std::array<char, Handover::kTokenLength> token;

  /// Takes as long whatever the difference.
  bool operator==(const Hello& other) const {
    unsigned difference = 0;
    for (std::size_t i = 0; i < token.size(); ++i) {
      difference |= static_cast<unsigned char>(token[i] ^ other.token[i]);
    }
    return difference == 0;
  }
};

constexpr std::string_view kPrefix = "pycomm-";
constexpr int kNameBytes = 16;  // random ones

Descriptor open_socket() {
  Descriptor opened(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (opened.get() < 0) throw_system_error("socket(AF_UNIX)", kRemedy);
  return opened;
}

uid_t user_behind(int socket) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) {
    throw_system_error("getsockopt(SO_PEERCRED)", kRemedy);
  }
  return peer.uid;
}

/// Wait until one of the sockets can be read.
void await_readable(std::span<pollfd> sockets, Clock::time_point deadline,
                    const std::string& whom) {
  constexpr std::int64_t kMostMs = 1000 * 1000;  // poll counts in int
  for (;;) {
    const std::int64_t left =
        std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
    const int ready =
        left > 0 ? poll(sockets.data(), sockets.size(), static_cast<int>(std::min(left, kMostMs)))
                 : 0;
    if (ready > 0) return;
    if (left <= 0) {
      throw PeerLostError("init: " + whom +
                          " did not come to exchange shared memory. Read its log first.");
    }
    if (ready < 0 && errno != EINTR) throw_system_error("poll", kRemedy);
  }
}

void await_readable(int socket, Clock::time_point deadline, const std::string& whom) {
  pollfd entry{socket, POLLIN, 0};
  await_readable({&entry, 1}, deadline, whom);
}

/// Somebody who has called and not yet said enough to be known.
struct Caller {
  Descriptor socket;
  Hello hello{};
  std::size_t received = 0;

  enum class Says : std::uint8_t { kMore, kHello, kNothing };
  /// Read what has come, and never wait for the rest.
  Says listen() {
    const ssize_t bytes = recv(socket.get(), hello.token.data() + received,
                               hello.token.size() - received, MSG_DONTWAIT);
    if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return Says::kMore;
    if (bytes <= 0) return Says::kNothing;
    received += static_cast<std::size_t>(bytes);
    return received == hello.token.size() ? Says::kHello : Says::kMore;
  }
};

/// A message of one byte that carries one descriptor.
struct DescriptorMessage {
  char byte = 0;
  iovec data{&byte, 1};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr header{};

  DescriptorMessage() {
    header.msg_iov = &data;
    header.msg_iovlen = 1;
    header.msg_control = control.data();
    header.msg_controllen = control.size();
  }
  DescriptorMessage(const DescriptorMessage&) = delete;  // it points into itself
  DescriptorMessage& operator=(const DescriptorMessage&) = delete;
};

void send_descriptor(int socket, int descriptor) {
  DescriptorMessage message;
  cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(rights), &descriptor, sizeof(int));
  if (sendmsg(socket, &message.header, MSG_NOSIGNAL) == 1) return;
  if (errno == EPIPE || errno == ECONNRESET) {
    throw PeerLostError("init: a rank of this host ended while it exchanged shared memory.");
  }
  throw_system_error("sendmsg", kRemedy);
}

Descriptor receive_descriptor(int socket, const std::string& whom) {
  DescriptorMessage message;
  if (recvmsg(socket, &message.header, MSG_CMSG_CLOEXEC) != 1) {
    throw PeerLostError("init: " + whom + " ended, or refused to hand over its shared memory.");
  }
  const cmsghdr* rights = CMSG_FIRSTHDR(&message.header);
  if (rights == nullptr || rights->cmsg_level != SOL_SOCKET || rights->cmsg_type != SCM_RIGHTS ||
      rights->cmsg_len != CMSG_LEN(sizeof(int)) || (message.header.msg_flags & MSG_CTRUNC) != 0) {
    throw CommError("init: " + whom + " sent no descriptor. " + kRemedy);
  }
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(rights), sizeof(int));
  return Descriptor(descriptor);
}

}  // namespace

std::string random_hex(int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) {
    unsigned char byte = 0;
    if (getrandom(&byte, 1, 0) != 1) throw_system_error("getrandom", "");
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

bool Handover::is_address(std::string_view text) {
  return text.starts_with(kPrefix) && text.size() == kPrefix.size() + 2 * kNameBytes &&
         text.find_first_not_of("0123456789abcdef", kPrefix.size()) == std::string_view::npos;
}

Handover::Handover() : address_(std::string(kPrefix) + random_hex(kNameBytes)) {
  listener_ = open_socket().release();
  const auto [address, length] = socket_address(address_);
  if (bind(listener_, reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
      listen(listener_, SOMAXCONN) != 0) {
    const int reason = errno;
    close(listener_);
    errno = reason;
    throw_system_error("bind to abstract socket " + address_, kRemedy);
  }
}

Handover::~Handover() { close(listener_); }

void Handover::serve(const std::array<char, kTokenLength>& token, int descriptor, std::size_t ranks,
                     std::chrono::steady_clock::time_point deadline) const {
  std::vector<Caller> callers;
  std::size_t strangers = 0;
  while (ranks > 0) {
    std::vector<pollfd> sockets{{listener_, POLLIN, 0}};
    for (const Caller& caller : callers) sockets.push_back({caller.socket.get(), POLLIN, 0});
    await_readable(
        sockets, deadline,
        "a rank of this host" + (strangers == 0 ? std::string()
                                                : " (while " + std::to_string(strangers) +
                                                      " strangers called, who were sent away)"));
    for (std::size_t i = callers.size(); i-- > 0;) {
      if (sockets[i + 1].revents == 0) continue;
      const Caller::Says says = callers[i].listen();
      if (says == Caller::Says::kMore) continue;
      if (says == Caller::Says::kHello && callers[i].hello == Hello{token}) {
        send_descriptor(callers[i].socket.get(), descriptor);
        --ranks;
      } else {
        ++strangers;
      }
      callers.erase(callers.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (sockets.front().revents == 0) continue;
    Descriptor socket(accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC));
    if (socket.get() < 0) {
      if (errno == ECONNABORTED || errno == EINTR) continue;
      throw_system_error("accept", kRemedy);
    }
    if (user_behind(socket.get()) == geteuid()) {
      callers.push_back({std::move(socket)});
    } else {
      ++strangers;
    }
  }
}

std::vector<Descriptor> Handover::exchange(int local_rank,
                                           const std::vector<std::string>& addresses,
                                           const std::vector<int>& world_ranks,
                                           const std::string& token, int descriptor,
                                           std::chrono::nanoseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  const auto whom = [&](std::size_t peer) { return "rank " + std::to_string(world_ranks[peer]); };
  Hello hello{};
  std::memcpy(hello.token.data(), token.data(), std::min(token.size(), hello.token.size()));

  // Everybody's listener is open before its address is known, so every connect succeeds at once
  // and nobody waits in a circle.
  std::vector<Descriptor> calls;
  for (std::size_t peer = 0; peer < addresses.size(); ++peer) {
    calls.push_back(open_socket());
    if (static_cast<int>(peer) == local_rank) continue;
    const auto [address, length] = socket_address(addresses[peer]);
    if (connect(calls[peer].get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      throw PeerLostError("init: " + whom(peer) + " cannot be reached on this host (" +
                          std::strerror(errno) + "). Read its log first.");
    }
    if (const uid_t user = user_behind(calls[peer].get()); user != geteuid()) {
      throw CommError("init: " + whom(peer) + " runs as user " + std::to_string(user) +
                      ", this rank as user " + std::to_string(geteuid()) +
                      ".\n  Start all ranks of a job as one user.");
    }
    if (send(calls[peer].get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
      throw_system_error("send to " + whom(peer), kRemedy);
    }
  }
  serve(hello.token, descriptor, addresses.size() - 1, deadline);
  std::vector<Descriptor> received;
  for (std::size_t peer = 0; peer < addresses.size(); ++peer) {
    if (static_cast<int>(peer) == local_rank) {
      received.emplace_back(-1);
      continue;
    }
    await_readable(calls[peer].get(), deadline, whom(peer));
    received.push_back(receive_descriptor(calls[peer].get(), whom(peer)));
  }
  return received;
}

}  // namespace pycomm
