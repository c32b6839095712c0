#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// A test program is one file that includes this header and writes
//
//   TEST(a_name) { CHECK_EQUAL(1 + 1, 2); }
//
// Without arguments it runs every test, with arguments the tests of those names, with --list it
// prints the names. A failed check throws, so it ends its test and may be thrown in another thread
// that hands its exceptions on. The exit status is 0 only if something ran and all of it passed.

namespace check {

class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*body)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registration {
  Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

/// A value as a failure shows it: what << prints; enums and bytes as numbers, the rest by size.
template <typename T>
std::string shown(const T& value) {
  std::ostringstream out;
  out.precision(17);
  out << std::boolalpha;
  if constexpr (std::is_enum_v<T>) {
    out << static_cast<long long>(value);
  } else if constexpr (std::is_integral_v<T> && sizeof(T) == 1 && !std::is_same_v<T, bool>) {
    out << static_cast<int>(value);
  } else if constexpr (requires { out << value; }) {
    out << value;
  } else {
    out << '<' << sizeof(T) << "-byte value>";
  }
  return out.str();
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& message) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + message);
}

template <typename A, typename B>
void check_equal(const A& a, const B& b, const char* a_text, const char* b_text, const char* file,
                 int line) {
  bool equal;
  if constexpr (std::is_integral_v<A> && std::is_integral_v<B>) {
    equal = std::cmp_equal(+a, +b);  // -1 is not 4294967295
  } else if constexpr (std::is_convertible_v<const A&, std::string_view> &&
                       std::is_convertible_v<const B&, std::string_view>) {
    equal = std::string_view(a) == std::string_view(b);
  } else {
    equal = a == b;
  }
  if (equal) return;
  fail(file, line,
       std::string("CHECK_EQUAL(") + a_text + ", " + b_text + ")\n    left:  " + shown(a) +
           "\n    right: " + shown(b));
}

template <typename Exception, typename Body>
void check_throws(Body&& body, const char* part, const char* text, const char* file, int line) {
  std::string call = std::string("CHECK_THROWS(") + text + ")";
  try {
    body();
  } catch (const Exception& error) {
    if (std::strstr(error.what(), part) != nullptr) return;
    fail(file, line, call + " threw \"" + error.what() + "\"\n    without: \"" + part + "\"");
  } catch (const std::exception& error) {
    fail(file, line, call + " threw another type: " + error.what());
  }
  fail(file, line, call + " threw nothing");
}

inline bool run(const Test& test) {
  try {
    test.body();
    std::printf("ok    %s\n", test.name);
    return true;
  } catch (const std::exception& error) {
    std::printf("FAIL  %s\n  %s\n", test.name, error.what());
  } catch (...) {
    std::printf("FAIL  %s\n  threw something that is no std::exception\n", test.name);
  }
  return false;
}

inline int run_named(int argument_count, char** arguments) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a test that hangs or crashes leaves what ran before
  if (argument_count == 2 && std::strcmp(arguments[1], "--list") == 0) {
    for (const Test& test : tests()) std::printf("%s\n", test.name);
    return 0;
  }
  int ran = 0;
  int failed = 0;
  auto run_counted = [&](const Test& test) {
    ++ran;
    if (!run(test)) ++failed;
  };
  if (argument_count < 2) {
    for (const Test& test : tests()) run_counted(test);
  }
  for (int i = 1; i < argument_count; ++i) {
    int before = ran;
    for (const Test& test : tests()) {
      if (std::strcmp(test.name, arguments[i]) == 0) run_counted(test);
    }
    if (ran == before) {
      std::printf("no test is named %s; --list prints the names\n", arguments[i]);
      return 2;
    }
  }
  std::printf("%d of %d tests passed\n", ran - failed, ran);
  return ran > 0 && failed == 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                           \
  static void test_##name();                                                 \
  static const check::Registration registration_##name(#name, &test_##name); \
  static void test_##name()

/// Any condition; may hold commas.
#define CHECK(...)                                                                  \
  do {                                                                              \
    if (!(__VA_ARGS__)) check::fail(__FILE__, __LINE__, "CHECK(" #__VA_ARGS__ ")"); \
  } while (false)

/// Both values are printed when they differ.
#define CHECK_EQUAL(a, b) check::check_equal((a), (b), #a, #b, __FILE__, __LINE__)

/// `expression` must throw `Exception` (or a class derived from it) with `part` in its text.
#define CHECK_THROWS(expression, Exception, part)                                           \
  check::check_throws<Exception>([&] { static_cast<void>(expression); }, part, #expression, \
                                 __FILE__, __LINE__)

int main(int argument_count, char** arguments) {
  return check::run_named(argument_count, arguments);
}
