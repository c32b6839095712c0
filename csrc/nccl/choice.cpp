#include "nccl/choice.h"

#include <atomic>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "collectives/open.h"
#include "nccl/cards.h"
#include "nccl/pair.h"
#include "nccl/staged.h"
#include "nccl/staged_pair.h"

namespace pycomm::nccl {
namespace {

/// Once a process.
/// @param way  that the calls go; PYCOMM_GPU_TRANSPORT asks for it by `name`.
void warn(const std::string& way, const char* name, const std::string& reason) {
  static std::atomic<bool> has_warned{false};
  if (has_warned.exchange(true)) return;
  std::fprintf(stderr,
               "pycomm: warning: calls on GPUs go %s, which is slower than NCCL: %s\n  "
               "PYCOMM_GPU_TRANSPORT=%s accepts that, and =nccl makes it an error.\n",
               way.c_str(), reason.c_str(), name);
}

class ChoosingGroup final : public GpuGroup {
 public:
  ChoosingGroup(std::shared_ptr<Device> device, Transport transport, std::shared_ptr<MpiAnswer> mpi,
                MakeGroup make_nccl)
      : device_(std::move(device)),
        transport_(transport),
        mpi_(std::move(mpi)),
        make_nccl_(std::move(make_nccl)) {}

  Task<> run(Context& context, const Operation& operation) override {
    if (chosen_ == nullptr) {
      co_await open_operation(context, operation, Announcement::kNotInArena, {});
      co_await choose(context);
      context.begin_part();
    }
    co_await chosen_->run(context, operation);
  }
  bool in_flight() const override { return chosen_ != nullptr && chosen_->in_flight(); }
  std::string describe() const override { return chosen_ != nullptr ? chosen_->describe() : ""; }
  void poll() override {
    if (chosen_ != nullptr) chosen_->poll();
  }
  void abort() override {
    if (chosen_ != nullptr) chosen_->abort();
  }

 private:
  Task<> choose(Context& context) {
    const Card mine = device_->card(/*makes_id=*/false);
    const std::vector<Card> cards =
        co_await gather_cards(context, mine, "choosing what carries calls on GPUs");
    const std::string lack = without_nccl(cards);
    if (transport_ == Transport::kAuto && lack.empty()) {
      chosen_ = make_nccl_();
      co_return;
    }
    const bool warns = transport_ == Transport::kAuto && context.rank == 0;
    // Ranks with an NCCL may run its kernels for other groups, and MPI must not meet those.
    const bool may_use_mpi = transport_ == Transport::kMpi || all_without_nccl(cards);
    std::string reason = lack;
    if (may_use_mpi && context.host_count() > 1) {
      mpi_->ask();
      MpiAnswer::Given answered(*mpi_);
      co_await until(answered);
      const std::string problem =
          co_await first_problem(context, *mpi_->problem(), "asking whether MPI takes GPU memory");
      if (problem.empty()) {
        if (warns) warn("from their memory to MPI", "mpi", lack);
        const std::size_t scratch = kernels_problem_of(cards).empty() ? least_scratch_of(cards) : 0;
        chosen_ = make_staged_group(device_, GpuAwareMpi{scratch});
        co_return;
      }
      if (transport_ == Transport::kMpi) {
        throw RefusedError(
            "PYCOMM_GPU_TRANSPORT is mpi, and MPI takes no pointers to GPU memory: " + problem +
            ".\n  Use an MPI that was built for CUDA, or let the variable be auto. "
            "PYCOMM_MPI_CUDA=1 says that yours does take them.");
      }
      reason += ". MPI takes no pointers to GPU memory either: " + problem;
    }
    if (warns) warn("through the memory of the hosts", "staged", reason);
    chosen_ = make_staged_group(device_);
  }

  const std::shared_ptr<Device> device_;
  const Transport transport_;
  const std::shared_ptr<MpiAnswer> mpi_;
  const MakeGroup make_nccl_;
  std::unique_ptr<GpuGroup> chosen_;  // since the first call
};

/// Until both have chosen, what a rank proposes begins with a byte: whether it has an NCCL. What
/// NCCL's pair proposes follows.
class ChoosingPair final : public GpuPair {
 public:
  ChoosingPair(std::shared_ptr<Device> device, const Pairing& pairing)
      : device_(std::move(device)), pairing_(pairing) {}

  std::vector<std::byte> propose() override {
    if (has_chosen_) return pair_->propose();
    std::vector<std::byte> proposal{std::byte{device_->nccl.has_value()}};
    if (device_->nccl) {
      pair_ = make_nccl_pair(device_, pairing_);
      const auto its = pair_->propose();
      proposal.insert(proposal.end(), its.begin(), its.end());
    }
    return proposal;
  }

  Task<> launch(std::vector<GpuMessage> batch, std::vector<std::byte> theirs) override {
    if (!has_chosen_) {
      if (theirs.empty()) throw MismatchError(kMalformedProposal);
      choose(/*they_have_nccl=*/theirs.front() != std::byte{0});
      theirs.erase(theirs.begin());
    }
    return pair_->launch(std::move(batch), std::move(theirs));
  }
  bool in_flight() const override { return has_chosen_ && pair_->in_flight(); }
  std::string describe() const override { return has_chosen_ ? pair_->describe() : ""; }
  void poll() override {
    if (has_chosen_) pair_->poll();
  }
  void abort() override {
    if (pair_ != nullptr) pair_->abort();
  }

 private:
  void choose(bool they_have_nccl) {
    has_chosen_ = true;
    if (!device_->nccl) {
      warn("through the memory of the hosts", "staged",
           "rank " + std::to_string(pairing_.rank) + " cannot use NCCL: " + device_->nccl_problem);
    }
    if (!device_->nccl || !they_have_nccl) pair_ = make_staged_pair(device_, pairing_);
  }

  const std::shared_ptr<Device> device_;
  const Pairing pairing_;
  std::unique_ptr<GpuPair> pair_;  // until both have chosen it is NCCL's, or none
  bool has_chosen_ = false;
};

}  // namespace

std::unique_ptr<GpuGroup> make_choosing_group(std::shared_ptr<Device> device, Transport transport,
                                              std::shared_ptr<MpiAnswer> mpi, MakeGroup make_nccl) {
  return std::make_unique<ChoosingGroup>(std::move(device), transport, std::move(mpi),
                                         std::move(make_nccl));
}

std::unique_ptr<GpuPair> make_choosing_pair(std::shared_ptr<Device> device,
                                            const Pairing& pairing) {
  return std::make_unique<ChoosingPair>(std::move(device), pairing);
}

}  // namespace pycomm::nccl
