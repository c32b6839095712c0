#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "core/task.h"
#include "nccl/report.h"

namespace pycomm::nccl {

/// Whether this process's MPI takes pointers to GPU memory. It is found out once, by a thread of
/// its own, since that may take seconds in which nobody else should stand still.
class MpiAnswer {
 public:
  /// @param ask  none: there is no MPI.
  explicit MpiAnswer(MpiProblem ask) : ask_(std::move(ask)) {}

  /// Waits for the answer, which somebody has to ask for first.
  class Given final : public Wait {
   public:
    explicit Given(const MpiAnswer& answer) : answer_(answer) {}
    bool poll() override { return answer_.problem().has_value(); }
    std::string describe() const override {
      return "this rank to find out whether its MPI takes GPU memory";
    }
    bool rings_doorbell() const override { return false; }

   private:
    const MpiAnswer& answer_;
  };

  /// Begin to find out, unless that was done before.
  void ask();
  /// Empty: it does. Nothing: not known yet.
  std::optional<std::string> problem() const;

 private:
  /// Outlives this, as the thread does if nobody waits for it.
  struct Shared {
    std::mutex mutex;
    std::optional<std::string> problem;
  };

  MpiProblem ask_;
  bool asked_ = false;
  const std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
};

}  // namespace pycomm::nccl
