#include "collectives/lane_stream.h"

namespace pycomm {

LaneStream::Ticket LaneStream::send(int to_host, std::span<const std::byte> bytes, Ticket after) {
  sends_.queued.push_back({to_host, bytes, after});
  return last_send();
}

LaneStream::Ticket LaneStream::receive(int from_host, std::span<std::byte> bytes) {
  receives_.queued.push_back({from_host, bytes, 0});
  return last_receive();
}

void LaneStream::move() {
  receives_.move(0, [this](int host, auto bytes) { return lane_.receive(host, bytes); });
  sends_.move(receives_.finished, [this](int host, auto bytes) { return lane_.send(host, bytes); });
}

bool LaneStream::Over::poll() {
  stream_.move();
  return stream_.sends_.finished >= sends_ && stream_.receives_.finished >= receives_;
}

std::string LaneStream::Over::describe() const {
  return stream_.receives_.finished < receives_ ? stream_.receives_.active.front()->describe()
                                                : stream_.sends_.active.front()->describe();
}

bool LaneStream::While::poll() {
  stream_.move();
  return other_.poll();
}

bool LaneStream::While::rings_doorbell() const {
  return other_.rings_doorbell() && stream_.sends_.backlog() + stream_.receives_.backlog() == 0;
}

}  // namespace pycomm
