#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace simulation {

/// SplitMix64: the same numbers from a seed with every compiler and library.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  /// 0 to end-1.
  template <typename Integer>
  Integer below(Integer end) {
    return static_cast<Integer>(next() % static_cast<std::uint64_t>(end));
  }
  /// first to last.
  int between(int first, int last) { return first + below(last - first + 1); }
  bool chance(double probability) {
    return static_cast<double>(next() >> 11) * 0x1p-53 < probability;
  }
  template <typename T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
  }

 private:
  std::uint64_t state_;
};

}  // namespace simulation
