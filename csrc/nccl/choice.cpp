#include "nccl/choice.h"

#include <atomic>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "collectives/open.h"
#include "nccl/cards.h"
#include "nccl/staged.h"

namespace pycomm::nccl {
namespace {

/// Once a process.
void warn_of_staging(const std::string& reason) {
  static std::atomic<bool> has_warned{false};
  if (has_warned.exchange(true)) return;
  std::fprintf(stderr,
               "pycomm: warning: calls on GPUs go through the memory of the hosts, which is slower "
               "than NCCL: %s\n  PYCOMM_GPU_TRANSPORT=staged accepts that, and =nccl makes it an "
               "error.\n",
               reason.c_str());
}

class ChoosingGroup final : public GpuGroup {
 public:
  ChoosingGroup(std::shared_ptr<Device> device,
                std::function<std::unique_ptr<GpuGroup>()> make_nccl)
      : device_(std::move(device)), make_nccl_(std::move(make_nccl)) {}

  Task<> run(Context& context, const Operation& operation) override {
    if (chosen_ == nullptr) {
      co_await open_operation(context, operation, Announcement::kNotInArena, {});
      co_await choose(context);
      ++context.sequence;
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
        co_await gather_cards(context, mine, "choosing between NCCL and staging");
    const std::string reason = without_nccl(cards);
    if (!reason.empty() && context.rank == 0) warn_of_staging(reason);
    chosen_ = reason.empty() ? make_nccl_() : make_staged_group(device_);
  }

  const std::shared_ptr<Device> device_;
  const std::function<std::unique_ptr<GpuGroup>()> make_nccl_;
  std::unique_ptr<GpuGroup> chosen_;  // since the first call
};

}  // namespace

std::unique_ptr<GpuGroup> make_choosing_group(
    std::shared_ptr<Device> device, std::function<std::unique_ptr<GpuGroup>()> make_nccl) {
  return std::make_unique<ChoosingGroup>(std::move(device), std::move(make_nccl));
}

}  // namespace pycomm::nccl
