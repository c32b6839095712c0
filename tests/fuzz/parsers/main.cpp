// Without libFuzzer: the files of a corpus, the seeds, and mutations of both from a given seed.
//
//   fuzz_NAME [--inputs N] [--seed S] [--write-seeds FOLDER] [FILE or FOLDER]...
//
// A defect ends the process; the input is in ./crash-NAME-S-I then, and is run again by naming it.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "parser.h"

namespace {

namespace fs = std::filesystem;
using Random = std::mt19937_64;

std::string current;
std::string crash_file;

/// Calls nothing but write(2): the heap may be what is broken.
void keep_current(int number) {
  if (std::FILE* const file = std::fopen(crash_file.c_str(), "wb")) {
    std::fwrite(current.data(), 1, current.size(), file);
    std::fclose(file);
    std::fprintf(stderr, "the input is in %s\n", crash_file.c_str());
  }
  signal(number, SIG_DFL);
  raise(number);
}

void run(std::string input) {
  current = std::move(input);
  // In memory as long as the input.
  const std::vector<std::uint8_t> exact(current.begin(), current.end());
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string mutated(std::string input, const std::vector<std::string>& all, Random& random) {
  static const std::vector<std::uint64_t> kInteresting = {0,
                                                          1,
                                                          2,
                                                          0x7F,
                                                          0x80,
                                                          0xFF,
                                                          0x7FFF,
                                                          0xFFFF,
                                                          0x7FFFFFFF,
                                                          0x80000000,
                                                          0xFFFFFFFF,
                                                          0x7FFFFFFFFFFFFFFF,
                                                          0x8000000000000000,
                                                          0xFFFFFFFFFFFFF000,
                                                          0xFFFFFFFFFFFFFFFF};
  const auto below = [&](std::size_t bound) { return bound == 0 ? 0 : random() % bound; };
  for (std::size_t changes = 1 + below(4); changes > 0; --changes) {
    const std::size_t at = below(input.size() + 1);
    const std::size_t behind = input.size() - at;
    switch (below(6)) {
      case 0:
        if (behind > 0) input[at] = static_cast<char>(random());
        break;
      case 1: {
        const std::uint64_t value = kInteresting[below(kInteresting.size())];
        std::memcpy(input.data() + at, &value,
                    std::min<std::size_t>(behind, std::size_t{1} << below(4)));
        break;
      }
      case 2:
        input.erase(at, 1 + below(16));
        break;
      case 3:
        for (std::size_t i = 1 + below(16); i > 0; --i) {
          input.insert(at, 1, static_cast<char>(random()));
        }
        break;
      case 4:
        input.insert(at, input.substr(below(input.size() + 1), below(256)));
        break;
      default: {
        const std::string& other = all[below(all.size())];
        input = input.substr(0, at) + other.substr(below(other.size() + 1));
      }
    }
  }
  input.resize(std::min<std::size_t>(input.size(), 1 << 16));
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = fs::path(argv[0]).filename();
  std::size_t inputs = 5000;
  std::uint64_t seed = 1;
  std::vector<std::string> all = seeds();
  const std::size_t seed_count = all.size();
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&] { return std::string(i + 1 < argc ? argv[++i] : ""); };
    if (argument == "--inputs") {
      inputs = std::stoul(value());
    } else if (argument == "--seed") {
      seed = std::stoull(value());
    } else if (argument == "--write-seeds") {
      const fs::path folder = value();
      fs::create_directories(folder);
      for (std::size_t at = 0; at < seed_count; ++at) {
        std::ofstream(folder / ("seed-" + std::to_string(at)), std::ios::binary) << all[at];
      }
      return 0;
    } else if (fs::is_directory(argument)) {
      for (const auto& entry : fs::directory_iterator(argument)) all.push_back(read(entry.path()));
    } else if (fs::exists(argument)) {
      all.push_back(read(argument));
    }
  }
  for (const int number : {SIGSEGV, SIGBUS, SIGABRT, SIGFPE}) signal(number, keep_current);
  crash_file = "crash-" + name + "-given";
  for (const std::string& input : all) run(input);
  Random random(seed);
  for (std::size_t i = 0; i < inputs; ++i) {
    crash_file = "crash-" + name + "-" + std::to_string(seed) + "-" + std::to_string(i);
    run(mutated(all[random() % all.size()], all, random));
  }
  std::cout << name << ": " << all.size() << " given inputs and " << inputs << " from seed " << seed
            << "\n";
}
