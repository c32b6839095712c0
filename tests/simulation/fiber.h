#pragma once

#include <ucontext.h>

#include <array>
#include <cstddef>
#include <functional>

namespace simulation {

/// A thread of the simulated machine: a stack of its own that runs when it is told to. Exceptions
/// may be under way, or being handled, on both sides of a switch.
class Fiber {
 public:
  explicit Fiber(std::function<void()> body);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Run it until it calls suspend() or ends. Not from within a fiber.
  void resume();
  /// Back to who called resume(). Called by the fiber itself.
  void suspend();
  /// Its body has returned.
  bool done() const { return done_; }

 private:
  static void enter();
  void swap_exceptions();

  std::function<void()> body_;
  bool done_ = false;
  std::byte* stack_;
  ucontext_t mine_;
  ucontext_t theirs_;
  std::array<std::byte, 16> exceptions_{};  // of the side that does not run
  void* sanitizer_stack_ = nullptr;         // what the address sanitizer keeps of this fiber
  void* sanitizer_fiber_ = nullptr;         // and the thread sanitizer
};

}  // namespace simulation
