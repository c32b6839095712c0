#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// What a peer sends is bytes until it has been checked. Each file here gives such bytes to one
// parser of the core, which may do one of two things: take them, or throw a CommError. Anything
// else (a crash, what a sanitizer finds, another exception, an invariant that does not hold) is a
// defect.
//
// libFuzzer calls the function below (`make fuzz-parsers`); so does main.cpp, in the C++ tests,
// with what is in corpus/NAME, the seeds, and some thousand mutations of both.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t bytes);

/// Inputs that the parser takes, from which mutations begin.
std::vector<std::string> seeds();

/// Also in release builds.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}

/// Takes values off an input, zeros behind its end.
class Reader {
 public:
  Reader(const std::uint8_t* data, std::size_t bytes) : data_(data), left_(bytes) {}

  std::size_t left() const { return left_; }
  template <typename T>
  T take() {
    T value{};
    const std::size_t bytes = sizeof(T) < left_ ? sizeof(T) : left_;
    if (bytes > 0) std::memcpy(&value, data_, bytes);
    data_ += bytes;
    left_ -= bytes;
    return value;
  }
  /// At most `bytes` of them, in memory as long as they are: a sanitizer sees what is read behind.
  std::vector<std::byte> take_bytes(std::size_t bytes) {
    if (bytes > left_) bytes = left_;
    std::vector<std::byte> taken(bytes);
    if (bytes > 0) std::memcpy(taken.data(), data_, bytes);
    data_ += bytes;
    left_ -= bytes;
    return taken;
  }

 private:
  const std::uint8_t* data_;
  std::size_t left_;
};

template <typename T>
std::string bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}
