#include "fiber.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <cstring>
#include <new>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace simulation {
namespace {

constexpr std::size_t kGuardBytes = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kStackBytes = std::size_t{1} << 20;
#else
constexpr std::size_t kStackBytes = std::size_t{256} << 10;
#endif

Fiber* entering = nullptr;
#if defined(__SANITIZE_ADDRESS__)
const void* callers_stack = nullptr;
std::size_t callers_stack_bytes = 0;
#endif
#if defined(__SANITIZE_THREAD__)
void* callers_fiber = nullptr;
#endif

/// Stacks are used again: to map one takes longer than most fibers live.
std::vector<std::byte*>& spare_stacks() {
  static std::vector<std::byte*> stacks;
  return stacks;
}

std::byte* take_stack() {
  auto& spare = spare_stacks();
  if (!spare.empty()) {
    std::byte* const stack = spare.back();
    spare.pop_back();
    return stack;
  }
  void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  return static_cast<std::byte*>(memory);
}

}  // namespace

Fiber::Fiber(std::function<void()> body) : body_(std::move(body)), stack_(take_stack()) {
  getcontext(&mine_);
  mine_.uc_stack.ss_sp = stack_ + kGuardBytes;
  mine_.uc_stack.ss_size = kStackBytes;
  mine_.uc_link = nullptr;  // enter() never returns
  makecontext(&mine_, &Fiber::enter, 0);
#if defined(__SANITIZE_THREAD__)
  sanitizer_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  spare_stacks().push_back(stack_);
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(sanitizer_fiber_);
#endif
}

/// The runtime keeps what is being handled for each thread, and this is one.
void Fiber::swap_exceptions() {
  std::array<std::byte, 16> others;
  void* const current = abi::__cxa_get_globals();
  std::memcpy(others.data(), current, others.size());
  std::memcpy(current, exceptions_.data(), exceptions_.size());
  exceptions_ = others;
}

void Fiber::enter() {
  Fiber* const self = entering;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &callers_stack, &callers_stack_bytes);
#endif
  self->body_();
  self->body_ = nullptr;
  self->done_ = true;
  self->suspend();
}

void Fiber::resume() {
  swap_exceptions();
  entering = this;
#if defined(__SANITIZE_ADDRESS__)
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(&kept, stack_ + kGuardBytes, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  callers_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(sanitizer_fiber_, 0);
#endif
  swapcontext(&theirs_, &mine_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(kept, nullptr, nullptr);
#endif
  swap_exceptions();
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(done_ ? nullptr : &sanitizer_stack_, callers_stack,
                                 callers_stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(callers_fiber, 0);
#endif
  swapcontext(&mine_, &theirs_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_stack_, &callers_stack, &callers_stack_bytes);
#endif
}

}  // namespace simulation
