// Runs schedules from their seeds, and says of each that breaks a law how to run it again.
//
//   simulate --seeds 1 5000              seeds 1 to 5000
//   simulate --seed 17                   one, with all that every rank saw
//   simulate --seeds 1 5000 --expect-violation    succeeds if one of them is found
//   simulate --repeat 1 20               each of them twice: the same, step by step?
//
// Each few hundred runs have a process of their own: what a failed group leaves behind on purpose
// (quarantined memory) lives as long as that, and a crash is a finding like any other.

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>
#include <string>

#include "minimise.h"
#include "plan.h"
#include "run.h"
#include "tally.h"

namespace {

using namespace simulation;

constexpr int kRunsOfAProcess = 250;
constexpr int kMostFindings = 5;
constexpr unsigned kHangs_s = 300;  // of real time, for one process's runs

/// What a child process tells its parent, in memory that both have.
struct Report {
  Tally tally;
  std::uint64_t seed;   // of the current run
  std::uint64_t trace;  // of the last run
  bool found;
  char text[3000];
};

Report* report;

/// Run in a child process. @return  whether nothing was found.
template <typename Body>
bool in_child(const Body& body) {
  report->found = false;
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(kHangs_s);
    body();
    std::fflush(stdout);
    _exit(report->found ? 3 : 0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) {
    report->found = true;
    std::snprintf(report->text, sizeof(report->text), "the process ended by signal %d (%s)",
                  WTERMSIG(status), strsignal(WTERMSIG(status)));
  } else if (WEXITSTATUS(status) != 0 && !report->found) {
    report->found = true;
    std::snprintf(report->text, sizeof(report->text), "the process ended with status %d",
                  WEXITSTATUS(status));
  }
  return !report->found;
}

/// In a child: one run. What was found is in the report.
void run_one(const Plan& plan, bool tells_all) {
  report->seed = plan.seed;
  Run* const run = new Run(plan);
  std::string text;
  for (const std::string& found : run->run()) text += found + "\n";
  report->tally.add(*run);
  report->trace = run->machine().trace();
  if (tells_all) {
    std::printf("%s%s%s", plan.describe().c_str(), run->describe().c_str(),
                text.empty() ? "nothing was found\n" : text.c_str());
    std::printf("trace %016llx after %llu steps\n",
                static_cast<unsigned long long>(run->machine().trace()),
                static_cast<unsigned long long>(run->machine().steps()));
  }
  if (text.empty()) {
    delete run;
    return;
  }
  report->found = true;  // the process ends soon: what hangs is not taken down
  std::snprintf(report->text, sizeof(report->text), "%s", text.c_str());
}

void tell(const Plan& plan, const Cuts& cuts, bool minimises) {
  const std::string text = report->text;
  std::printf("seed %llu: %s", static_cast<unsigned long long>(plan.seed), text.c_str());
  Cuts smallest = cuts;
  if (minimises) {
    const Tally kept = report->tally;
    smallest = minimise(plan, cuts, [&](const Cuts& trial) {
      return !in_child([&] { run_one(trial.apply(plan), false); });
    });
    report->tally = kept;
  }
  std::printf("  again: simulate --seed %llu%s\n", static_cast<unsigned long long>(plan.seed),
              smallest.arguments().c_str());
}

/// Whether each of these seeds makes the same run twice.
bool repeat(std::uint64_t first, std::uint64_t count) {
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    std::uint64_t traces[2];
    for (std::uint64_t& trace : traces) {
      in_child([&] { run_one(Plan::of(seed), /*tells_all=*/false); });
      trace = report->trace;
    }
    if (traces[0] == traces[1]) continue;
    std::printf("seed %llu made two different runs\n", static_cast<unsigned long long>(seed));
    return false;
  }
  std::printf("%llu runs were the same twice\n", static_cast<unsigned long long>(count));
  return true;
}

std::vector<int> numbers_of(const char* text) {
  std::vector<int> numbers;
  std::istringstream list(text);
  for (std::string number; std::getline(list, number, ',');) numbers.push_back(std::stoi(number));
  return numbers;
}

/// Arenas are descriptors, and those of failed groups stay open as long as the process.
void allow_descriptors() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

int main(int argument_count, char** arguments) {
  std::uint64_t first = 1;
  std::uint64_t count = 1000;
  bool one = false;
  bool repeats = false;
  bool expects_violation = false;
  bool minimises = true;
  Cuts cuts;
  for (int i = 1; i < argument_count; ++i) {
    const std::string argument = arguments[i];
    const auto value = [&] {
      if (++i < argument_count) return arguments[i];
      std::fprintf(stderr, "%s needs a value\n", argument.c_str());
      std::exit(2);
    };
    if (argument == "--seeds") {
      first = std::strtoull(value(), nullptr, 10);
      count = std::strtoull(value(), nullptr, 10);
    } else if (argument == "--repeat") {
      first = std::strtoull(value(), nullptr, 10);
      count = std::strtoull(value(), nullptr, 10);
      repeats = true;
    } else if (argument == "--seed") {
      first = std::strtoull(value(), nullptr, 10);
      one = true;
    } else if (argument == "--without-steps") {
      cuts.steps = numbers_of(value());
    } else if (argument == "--without-faults") {
      cuts.faults = numbers_of(value());
    } else if (argument == "--calm") {
      cuts.calm = true;
    } else if (argument == "--as-it-is") {
      minimises = false;
    } else if (argument == "--expect-violation") {
      expects_violation = true;
      minimises = false;
    } else {
      std::fprintf(stderr, "what is %s? The head of simulate.cpp shows how it is called.\n",
                   argument.c_str());
      return 2;
    }
  }
  allow_descriptors();
  report =
      new (mmap(nullptr, sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0))
          Report();
  if (one) {
    const bool clean = in_child([&] { run_one(cuts.apply(Plan::of(first)), /*tells_all=*/true); });
    if (!clean) std::printf("found: %s\n", report->text);
    return clean ? 0 : 1;
  }
  if (repeats) return repeat(first, count) ? 0 : 1;
  const auto began = std::chrono::steady_clock::now();
  int findings = 0;
  for (std::uint64_t seed = first; seed < first + count;) {
    const std::uint64_t end = std::min(seed + kRunsOfAProcess, first + count);
    const bool clean = in_child([&] {
      for (std::uint64_t each = seed; each < end && !report->found; ++each) {
        run_one(Plan::of(each), /*tells_all=*/false);
      }
    });
    seed = clean ? end : report->seed + 1;
    if (clean) continue;
    ++findings;
    if (expects_violation) {
      std::printf("found with seed %llu: %s", static_cast<unsigned long long>(report->seed),
                  report->text);
      return 0;
    }
    tell(Plan::of(report->seed), cuts, minimises);
    if (findings == kMostFindings) break;
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
  std::printf("%s%d violations\n", report->tally.describe(taken.count()).c_str(), findings);
  if (expects_violation) std::printf("none was found, and one should have been\n");
  return findings == 0 && !expects_violation ? 0 : 1;
}
