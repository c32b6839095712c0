#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/task.h"
#include "nccl/plane.h"
#include "point_to_point/frame.h"
#include "point_to_point/transfer.h"

namespace pycomm {

/// One rank's messages between GPUs in one group. They are matched on the host as all others are,
/// so that what does not fit is found before anything is launched. Then both ranks launch their
/// halves in batches (see nccl::GpuPair), of which the lower rank says what is in them:
///
///   lower rank                                      higher rank
///   kMessage, later matched there            --->
///                                            <---   kRequest: it is
///                                            <---   kMessage, matched here
///   kBatch: all that is matched by now,
///           and my proposal for the order    --->
///                                            <---   kProposal: mine
///   launches the batch                              launches the batch
///
/// A pair has one batch under way, and what is matched meanwhile goes into the next one. A batch
/// waits for no call that somebody has yet to make, so its place in the launch order holds up the
/// calls of other groups no longer than two frames take.
///
/// Used by one thread at a time; what touches GPUs (advance, leave) is for the progress thread.
class GpuMail {
 public:
  using TransferPtr = std::shared_ptr<Transfer>;
  using Proposal = std::vector<std::byte>;
  using Connect = std::function<std::unique_ptr<nccl::GpuPair>(int peer, nccl::HostMail& mail)>;
  struct Letter {
    int to;
    Frame frame;
    std::vector<std::byte> payload;
  };

  /// Messages of a batch: as many entries of a kBatch and a card fit a frame of any link.
  static constexpr std::size_t kMostInBatch = 32;

  GpuMail(int rank, Connect connect) : rank_(rank), connect_(std::move(connect)) {}
  ~GpuMail();
  GpuMail(const GpuMail&) = delete;
  GpuMail& operator=(const GpuMail&) = delete;

  /// The other half of this message, too, is ready to be launched. To the lower rank of the two.
  void matched(int peer, TransferPtr half);
  /// What the lower rank wants to launch next, and its proposal. To the higher one, which must have
  /// begun the batch before.
  void ordered(int peer, std::vector<TransferPtr> batch, Proposal theirs);
  /// The higher rank's proposal for the batch that was sent to it.
  void answered(int peer, Proposal theirs);
  /// Whether such a batch is waiting for that.
  bool awaits_answer(int peer) const;
  bool may_be_ordered(int peer) const;
  /// Of a kBatch: which message of its sender, and whether the higher rank is that.
  static std::pair<std::uint64_t, bool> entry(const std::byte* payload, std::uint64_t index);
  static Proposal proposal(const std::byte* payload, const Frame& frame);

  /// Go on as far as possible. True if something happened.
  /// @throws CommTimeoutError, PeerLostError, CommError  of NCCL or a GPU; the group is finished.
  bool advance();
  /// What is to be told to others.
  std::vector<Letter> take_letters() { return std::exchange(letters_, {}); }
  /// What a pair without NCCL moves between the hosts: to be posted, in this order.
  std::vector<TransferPtr> take_pieces() { return std::exchange(pieces_, {}); }
  /// Halves that were launched, or refused.
  std::vector<TransferPtr> take_done() { return std::exchange(done_, {}); }

  void append_unfinished(std::vector<TransferPtr>& all) const;
  /// A message that was launched and that a GPU has yet to finish, for errors; "" if there is none.
  std::string describe_launched() const;
  /// What a message waits for that has been matched; empty: it has not.
  std::string obstacle(const Transfer& transfer) const;

  /// advance() has something to do that it did not know of.
  bool has_news() const { return has_news_; }
  /// Something is under way that rings no doorbell.
  bool must_be_polled() const;
  /// Nothing is matched, under way or on the GPU.
  bool idle() const;

  /// Forget all messages; what was launched stays on the GPU.
  void forget();
  /// The group is finished: the next advance() aborts what is on the GPU.
  void give_up() { gives_up_ = !peers_.empty(); }
  /// Disconnect, waiting for what is on the GPU unless it was given up: by this rank, or, as
  /// `given_up()` says, by another, whose GPU will then not do its part.
  void leave(const std::function<bool()>& given_up);

 private:
  /// A batch that both ranks know, on its way to the GPU.
  struct Launch {
    explicit Launch(Task<> task) : task(std::move(task)) { this->task.start(suspension); }
    Suspension suspension;
    Task<> task;
  };
  /// Makes transfers of what a pair without NCCL moves.
  class Mail final : public nccl::HostMail {
   public:
    Mail(std::vector<TransferPtr>& pieces, int peer) : pieces_(pieces), peer_(peer) {}
    std::shared_ptr<Wait> send(std::span<const std::byte> bytes) override;
    std::shared_ptr<Wait> receive(std::span<std::byte> bytes) override;

   private:
    std::shared_ptr<Wait> add(Transfer::Direction direction, std::byte* memory, std::size_t bytes);

    std::vector<TransferPtr>& pieces_;
    const int peer_;
  };
  struct Peer {
    std::unique_ptr<Mail> mail;
    std::unique_ptr<nccl::GpuPair> pair;
    std::deque<TransferPtr> matched;
    std::vector<TransferPtr> batch;  // proposed, or being launched
    std::optional<Proposal> answer;  // to it
    std::unique_ptr<Launch> launch;
    std::vector<TransferPtr> ordered;  // comes next
    Proposal order;                    // that came with it

    bool idle() const { return matched.empty() && batch.empty() && ordered.empty(); }
  };

  bool advance(int number, Peer& peer);
  void abort();
  /// The lower rank's next batch.
  void propose(int number, Peer& peer);
  void launch(Peer& peer, Proposal theirs);
  /// The batch was launched; rethrows what ended it otherwise.
  void end_launch(Peer& peer);

  const int rank_;
  const Connect connect_;
  std::map<int, Peer> peers_;
  std::vector<Letter> letters_;
  std::vector<TransferPtr> pieces_;
  std::vector<TransferPtr> done_;
  bool has_news_ = false;
  bool gives_up_ = false;
};

}  // namespace pycomm
