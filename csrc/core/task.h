#pragma once

#include <coroutine>
#include <exception>
#include <optional>
#include <string>
#include <utility>

namespace pycomm {

/// Something an operation waits for. Whoever drives the operation polls it.
class Wait {
 public:
  virtual ~Wait() = default;

  /// True once the awaited thing has happened. May throw; the operation then fails with that.
  virtual bool poll() = 0;

  /// What is awaited, as an error says it: "rank 1 to arrive".
  virtual std::string describe() const = 0;

  /// Whether the one who makes poll() true also rings this process's doorbell. If not (MPI), the
  /// driver must look again by itself.
  virtual bool rings_doorbell() const = 0;
};

/// Where a suspended operation stands: the innermost coroutine and what it waits for.
struct Suspension {
  std::coroutine_handle<> innermost;
  Wait* wait = nullptr;
};

/// A lazily started coroutine. Collectives are written as tasks, so that one thread can drive the
/// operations of many groups and a blocking call can drive its own, with the same code.
///
/// References given to a task must outlive it; `co_await task` keeps the caller's frame alive.
template <typename T>
class Task;

namespace detail {

struct PromiseBase {
  Suspension* suspension = nullptr;
  std::coroutine_handle<> caller;
  std::exception_ptr error;

  std::suspend_always initial_suspend() noexcept { return {}; }

  struct ReturnToCaller {
    bool await_ready() noexcept { return false; }
    template <typename Promise>
    std::coroutine_handle<> await_suspend(std::coroutine_handle<Promise> finished) noexcept {
      auto caller = finished.promise().caller;
      return caller ? caller : std::noop_coroutine();
    }
    void await_resume() noexcept {}
  };
  ReturnToCaller final_suspend() noexcept { return {}; }
  void unhandled_exception() { error = std::current_exception(); }
};

template <typename T>
struct Promise : PromiseBase {
  std::optional<T> value;
  Task<T> get_return_object();
  void return_value(T result) { value.emplace(std::move(result)); }
  T take() {
    if (error) std::rethrow_exception(error);
    return std::move(*value);
  }
};

template <>
struct Promise<void> : PromiseBase {
  Task<void> get_return_object();
  void return_void() {}
  void take() {
    if (error) std::rethrow_exception(error);
  }
};

}  // namespace detail

template <typename T = void>
class [[nodiscard]] Task {
 public:
  using promise_type = detail::Promise<T>;
  using Handle = std::coroutine_handle<promise_type>;

  explicit Task(Handle handle) : handle_(handle) {}
  Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Task& operator=(Task&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Task() {
    if (handle_) handle_.destroy();
  }

  /// Run until the first wait that is not over, or to the end.
  void start(Suspension& suspension) {
    handle_.promise().suspension = &suspension;
    handle_.resume();
  }
  bool done() const { return handle_.done(); }
  /// The result, or the exception that ended the task.
  T take() { return handle_.promise().take(); }

  struct Awaiter {
    Handle callee;
    bool await_ready() { return false; }
    template <typename CallerPromise>
    Handle await_suspend(std::coroutine_handle<CallerPromise> caller) {
      callee.promise().suspension = caller.promise().suspension;
      callee.promise().caller = caller;
      return callee;
    }
    T await_resume() { return callee.promise().take(); }
  };
  Awaiter operator co_await() { return {handle_}; }

 private:
  Handle handle_;
};

namespace detail {

template <typename T>
Task<T> Promise<T>::get_return_object() {
  return Task<T>(std::coroutine_handle<Promise<T>>::from_promise(*this));
}

inline Task<void> Promise<void>::get_return_object() {
  return Task<void>(std::coroutine_handle<Promise<void>>::from_promise(*this));
}

struct UntilAwaiter {
  Wait& wait;
  bool await_ready() { return wait.poll(); }
  template <typename P>
  void await_suspend(std::coroutine_handle<P> self) {
    auto* suspension = self.promise().suspension;
    suspension->innermost = self;
    suspension->wait = &wait;
  }
  void await_resume() {}
};

}  // namespace detail

/// `co_await until(wait)` suspends the operation until `wait.poll()` is true.
inline detail::UntilAwaiter until(Wait& wait) { return {wait}; }

}  // namespace pycomm
