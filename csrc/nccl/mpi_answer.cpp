#include "nccl/mpi_answer.h"

#include <exception>
#include <thread>
#include <utility>

namespace pycomm::nccl {

void MpiAnswer::ask() {
  if (std::exchange(asked_, true)) return;
  if (!ask_) {
    shared_->problem = "there is none";
    return;
  }
  std::thread([shared = shared_, ask = ask_] {
    std::string problem;
    try {
      problem = ask();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    std::lock_guard lock(shared->mutex);
    shared->problem = std::move(problem);
  }).detach();
}

std::optional<std::string> MpiAnswer::problem() const {
  std::lock_guard lock(shared_->mutex);
  return shared_->problem;
}

}  // namespace pycomm::nccl
