#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "group/world.h"

/// Runs `body(world)` on every rank, a thread each, over the loopback transport; rank i lies on
/// pretend host hosts[i]. A rank that throws ends the job for the others. Returns what each threw
/// ("" if nothing).
/// @param channels  as for Process::loopback.
inline std::vector<std::string> run_worlds_catching(
    const std::vector<int>& hosts, const std::function<void(pycomm::World&)>& body,
    const pycomm::Process::Options& options,
    std::vector<std::shared_ptr<pycomm::Channel>> channels = {}) {
  const auto worlds = pycomm::World::loopback(hosts, options, std::move(channels));
  std::vector<std::string> errors(hosts.size());
  std::vector<std::thread> threads;
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(*worlds[rank]);
        worlds[rank]->close([] {});
      } catch (const std::exception& error) {
        errors[rank] = error.what();
        worlds[rank]->abort("rank " + std::to_string(rank) + " failed: " + error.what());
      }
    });
  }
  for (auto& thread : threads) thread.join();
  return errors;
}

/// The same for who needs the group of all ranks only.
inline std::vector<std::string> run_ranks_catching(
    const std::vector<int>& hosts, const std::function<void(pycomm::Group&)>& body,
    const pycomm::Process::Options& options,
    std::vector<std::shared_ptr<pycomm::Channel>> channels = {}) {
  return run_worlds_catching(
      hosts, [&](pycomm::World& world) { body(*world.group()); }, options, std::move(channels));
}

inline std::vector<std::string> run_ranks_catching(const std::vector<int>& hosts,
                                                   const std::function<void(pycomm::Group&)>& body,
                                                   double timeout_s = 60,
                                                   pycomm::Staging staging = {},
                                                   const pycomm::nccl::Places& gpu_places = {},
                                                   pycomm::nccl::Transport gpu_transport = {},
                                                   const pycomm::Tuning& tuning = {}) {
  return run_ranks_catching(
      hosts, body, {timeout_s, std::size_t{64} << 20, staging, tuning, gpu_places, gpu_transport});
}

/// The same, where nothing may be thrown.
inline void run_ranks(const std::vector<int>& hosts,
                      const std::function<void(pycomm::Group&)>& body,
                      pycomm::Staging staging = {}) {
  const auto errors = run_ranks_catching(hosts, body, 60, staging);
  for (std::size_t rank = 0; rank < errors.size(); ++rank) {
    if (!errors[rank].empty()) {
      throw check::Failure("rank " + std::to_string(rank) + ": " + errors[rank]);
    }
  }
}
