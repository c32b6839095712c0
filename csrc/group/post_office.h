#pragma once

#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/clock.h"
#include "group/engine.h"
#include "group/journal.h"
#include "group/work.h"
#include "point_to_point/courier.h"
#include "point_to_point/exchange.h"
#include "point_to_point/link.h"
#include "point_to_point/ring_link.h"

namespace pycomm {

class Group;

/// A Work that moves one message.
class TransferWork : public Work {
 public:
  using Work::Work;
  /// Whoever waits for it can move it: it is inside a host.
  bool driven_by_waiter = false;
  // Of what was received; valid once done().
  int source = Transfer::kAnySource;
  std::size_t count = 0;
  std::uint64_t immediate = 0;
};

/// Point-to-point messages of one group. They keep no order with its collectives, so neither waits
/// for the other; but on GPUs both are launched in one order (nccl/launch_order.h). A blocking call
/// between ranks of one host is driven by the thread that makes it, all others, and what is on
/// GPUs, by the progress thread. A message between GPUs is over once it was launched. An error
/// finishes the group, as one of a collective does.
class PostOffice : public Progressive {
 public:
  /// How much of each rank's memory for the group it needs, behind the staging.
  static std::size_t bytes(int local_size) { return RingLayout(local_size).bytes; }
  static void prepare_memory(std::byte* memory, int local_size);

  /// @param group  owns this.
  explicit PostOffice(Group& group);
  ~PostOffice() override = default;

  /// Never waits. `timeout_s` 0: the group's default.
  /// @throws InvalidArgumentError  nothing was sent; the group stays usable.
  std::shared_ptr<TransferWork> start(const Transfer& transfer, double timeout_s);

  /// Work::wait, in which the waiting thread drives what it waits for where it can.
  void wait(TransferWork& work, const InterruptCheck& check_interrupt);

  /// Returns who sent or received.
  /// @param before_waiting  as for Group::run.
  int run(const Transfer& transfer, double timeout_s, const InterruptCheck& check_interrupt,
          const std::function<void()>& before_waiting = {});

  // For the progress thread.
  State advance() override;
  void check() override;
  void abandon() override;

 private:
  static double seconds_since(Clock::time_point then) {
    return std::chrono::duration<double>(Clock::now() - then).count();
  }

  struct Item : Transfer {
    std::shared_ptr<TransferWork> work;
    Journal::Entry entry = 0;
    std::optional<Clock::time_point> left_since;     // its peer has called shutdown()
    std::optional<Clock::time_point> awaited_since;  // in a slot: somebody waits for it

    double seconds() const { return seconds_since(began); }
  };

  void check_arguments(const Transfer& transfer) const;
  /// Not by the progress thread alone, whose the channel and the GPUs are.
  bool can_be_driven_by_waiter(const Transfer& transfer) const;
  std::shared_ptr<Item> accept(const Transfer& transfer, double timeout_s) const;
  /// Run a small transfer between ranks of one host if the peer keeps pace: nothing is allocated
  /// and no clock is read, which takes longer than the message. False: it did not happen.
  bool run_at_once(const Transfer& transfer);
  /// Everything below holds mutex_.
  void check_usable() const;
  void post(const std::shared_ptr<Item>& item);
  bool drive();
  /// The same for messages between GPUs, for the progress thread.
  bool drive_gpus();
  /// Drive all transfers in this thread, which waits for one inside the host.
  /// @param check  called now and then, without the lock.
  void drive_until_done(const TransferWork& work, const std::function<void()>& check);
  /// Complete what is done, unless it was read beside a rank that has failed: that throws.
  void complete_done();
  void complete(Item& item, std::exception_ptr error);
  void check_peers_and_deadlines();
  void check(Item& item);
  /// Who could be at the other end has called shutdown().
  bool nobody_left_for(const Item& item) const;
  /// The exception being handled finishes the group.
  /// @param call  what an error that is not ours has interrupted.
  /// @return  what its caller is to be told.
  std::exception_ptr fail(const std::string& call);
  /// For errors that concern all of them.
  std::string first_unfinished() const;
  void end_all(const std::exception_ptr& error);
  /// Have the progress thread drive, if it does not already.
  void submit();

  std::string describe(const Transfer& transfer) const;
  /// Whether a rank of the group is on another host.
  bool is_remote(int peer) const;

  Group& group_;
  std::mutex mutex_;
  SelfLink self_;
  std::vector<std::unique_ptr<RingLink>> rings_;
  std::unique_ptr<Courier> courier_;  // null inside one host
  std::unique_ptr<Exchange> exchange_;
  std::vector<std::shared_ptr<Transfer>> done_;  // not completed yet
  bool engine_drives_ = false;
  bool failed_ = false;
};

}  // namespace pycomm
