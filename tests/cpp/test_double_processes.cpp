// The stand-ins for libcudart and libnccl (tests/double/) where each rank is a process. No GPU.

#include <dirent.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <new>
#include <vector>

#include "core/error.h"
#include "double/clique.h"
#include "nccl_rank.h"

using gpu_double::Clique;
using pycomm::DType;
using pycomm::Kind;
using pycomm::nccl::Communicator;
using pycomm::nccl::Device;

namespace {

constexpr int kMostRanks = gpu_double::kMostRanks;
constexpr unsigned kSecondsToHang = 60;

/// What the ranks' processes share: made before they are.
class Stage {
 public:
  static Stage* make() {
    void* const memory =
        mmap(nullptr, sizeof(Stage), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return new (memory) Stage;
  }

  void reach(int scene) { scene_ = scene; }
  void wait_for(int scene) const {
    while (scene_ < scene) usleep(1000);
  }

  void set_id(const ncclUniqueId& id) {
    id_ = id;
    has_id_ = true;
  }
  ncclUniqueId id() const {
    while (!has_id_) usleep(1000);
    return id_;
  }

  /// What a rank's failed check said.
  std::array<std::array<char, 2000>, kMostRanks> failures{};

 private:
  std::atomic<int> scene_{0};
  std::atomic<bool> has_id_{false};
  ncclUniqueId id_{};
};

/// Files of the double that this process has open.
int open_files() {
  int count = 0;
  DIR* const folder = opendir("/proc/self/fd");
  while (const dirent* const entry = readdir(folder)) {
    std::array<char, 100> target{};
    const std::string path = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(path.c_str(), target.data(), target.size() - 1) > 0 &&
        std::strstr(target.data(), "memfd:gpu double") != nullptr) {
      ++count;
    }
  }
  closedir(folder);
  return count;
}

using Body = std::function<void(int rank, Stage&)>;

/// Runs `body` in a process a rank. Nothing may be left of the double, and it must have had
/// nothing to blame; those of `killed` must have been killed.
void run_processes(int size, const Body& body, const std::vector<int>& killed = {}) {
  use_the_double();
  Stage& stage = *Stage::make();
  std::vector<pid_t> processes;
  std::fflush(stdout);
  for (int rank = 0; rank < size; ++rank) {
    const pid_t process = fork();
    if (process != 0) {
      processes.push_back(process);
      continue;
    }
    alarm(kSecondsToHang);
    try {
      body(rank, stage);
      check_nothing_is_left();
      CHECK_EQUAL(Clique::open_count(), 0);
      CHECK_EQUAL(open_files(), 1);  // its memory
      _exit(0);
    } catch (const std::exception& error) {
      std::snprintf(stage.failures[static_cast<std::size_t>(rank)].data(), stage.failures[0].size(),
                    "%s", error.what());
      _exit(1);
    }
  }
  std::string failures;
  for (int rank = 0; rank < size; ++rank) {
    int status = 0;
    waitpid(processes[static_cast<std::size_t>(rank)], &status, 0);
    const bool is_to_die = std::find(killed.begin(), killed.end(), rank) != killed.end();
    const bool is_well =
        is_to_die ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : status == 0;
    if (is_well) continue;
    failures += "rank " + std::to_string(rank) + " ended with status " + std::to_string(status) +
                ": " + stage.failures[static_cast<std::size_t>(rank)].data() + "\n";
  }
  munmap(&stage, sizeof(stage));
  CHECK_EQUAL(failures, "");
}

ncclUniqueId new_id() {
  ncclUniqueId id;
  ncclGetUniqueId(&id);
  return id;
}

/// As a rank on the current GPU.
ncclComm_t join(const ncclUniqueId& id, int size, int rank,
                ncclResult_t expected = ncclInProgress) {
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t communicator = nullptr;
  CHECK_EQUAL(ncclCommInitRankConfig(&communicator, size, id, rank, &config), expected);
  return communicator;
}

using ConnectedBody = std::function<void(NcclRank&, Stage&)>;

/// The same, all ranks in one communicator.
void run_connected(int size, const ConnectedBody& body, const std::vector<int>& killed = {}) {
  const auto connected = [&](int rank, Stage& stage) {
    if (rank == 0) stage.set_id(new_id());
    Gpu gpu(rank);
    const auto device = std::make_shared<Device>(pycomm::nccl::Places{}, rank);
    NcclRank me{rank, gpu, device, std::make_unique<Communicator>(device, stage.id(), size, rank)};
    me.communicator->settle();
    body(me, stage);
  };
  run_processes(size, connected, killed);
}

[[noreturn]] void die() {
  raise(SIGKILL);
  _exit(1);
}

/// What was launched cannot end, and has not after a while.
void check_hangs(const NcclRank& me) {
  for (int i = 0; i < 100; ++i) {
    CHECK_EQUAL(cudaStreamQuery(me.device->stream), cudaErrorNotReady);
    usleep(1000);
  }
}

/// Launches a sum without waiting for it.
void begin_sum(const NcclRank& me) {
  float* const data = me.gpu.put(Floats{1});
  cudaStreamSynchronize(me.gpu.stream());
  me.sum(*me.communicator, data, 1);
}

void abort_and_drain(const NcclRank& me) {
  me.communicator->abort();
  cudaStreamSynchronize(me.device->stream);
}

}  // namespace

TEST(double_processes_get_what_threads_get) {
  for (const int size : {1, 2, 3, 4}) {
    for (const bool starves : {false, true}) {
      run_connected(size, [=](NcclRank& me, Stage&) {
        // NCCL's stream moves only when nothing else can: that of some ranks, or of all.
        if (starves) gpu_double::starve(me.rank % 2 == 0 ? highest_priority() : Gpu::kPriority);
        const auto p = static_cast<std::size_t>(size);
        const std::size_t n = 1000;
        float* const mine = me.gpu.put(values(me.rank, n));
        float* const all = me.gpu.room<float>(n * p);
        float* const from = me.gpu.room<float>(n);
        cudaStreamSynchronize(me.gpu.stream());
        const auto run = [&](const pycomm::Operation& operation) {
          pycomm::nccl::launch(*me.communicator, operation, me.rank, size);
          me.communicator->settle();
          cudaStreamSynchronize(me.device->stream);
        };
        run(me.gpu.operation(Kind::kAllGather, DType::kFloat32, mine, all, n));
        Floats everyone;
        for (int rank = 0; rank < size; ++rank) {
          const Floats one = values(rank, n);
          everyone.insert(everyone.end(), one.begin(), one.end());
        }
        CHECK(me.gpu.get(all, n * p) == everyone);

        // Everyone to the next: sends and receives of one NCCL group.
        pycomm::Operation shift = me.gpu.operation(Kind::kAllToAll, DType::kFloat32, mine, from, 0);
        shift.input_counts.assign(p, 0);
        shift.output_counts.assign(p, 0);
        const int previous = (me.rank + size - 1) % size;
        shift.input_counts[static_cast<std::size_t>((me.rank + 1) % size)] = n;
        shift.output_counts[static_cast<std::size_t>(previous)] = n;
        run(shift);
        CHECK(me.gpu.get(from, n) == values(previous, n));

        for (int round = 0; round < 5; ++round) run(me.gpu.sum(mine, n));
        Floats expected = sums(size, n);
        for (float& value : expected) value *= static_cast<float>(size * size * size * size);
        CHECK(me.gpu.get(mine, n) == expected);
      });
    }
  }
}

TEST(double_a_process_whose_host_is_elsewhere_does_not_stop_its_gpu) {
  run_connected(2, [](NcclRank& me, Stage& stage) {
    if (me.rank == 1) {
      stage.wait_for(1);
      usleep(20000);  // the GPU of rank 0 has nothing to do
    }
    for (int i = 0; i < 2; ++i) begin_sum(me);
    if (me.rank == 0) {
      stage.reach(1);
      stage.wait_for(2);  // and does not ask for its GPU
    }
    cudaStreamSynchronize(me.device->stream);
    stage.reach(2);
  });
}

TEST(double_processes_with_different_counts_are_caught) {
  run_connected(2, [](NcclRank& me, Stage& stage) {
    const std::size_t count = me.rank == 0 ? 8 : 7;
    float* const data = me.gpu.put(values(me.rank, count));
    cudaStreamSynchronize(me.gpu.stream());
    pycomm::nccl::launch(*me.communicator, me.gpu.sum(data, count), me.rank, 2);
    ncclResult_t state = ncclSuccess;
    while (state == ncclSuccess || state == ncclInProgress) {
      ncclCommGetAsyncError(me.communicator->handle(), &state);
    }
    CHECK_EQUAL(state, ncclInvalidUsage);
    cudaStreamSynchronize(me.device->stream);
    CHECK(me.gpu.get(data, count) == values(me.rank, count));
    // The one whose GPU came last blames.
    const std::string blamed = gpu_double::errors();
    if (!blamed.empty()) {
      CHECK_EQUAL(blamed, "ranks made different calls: 8 and 7 elements\n");
      stage.reach(1);
    }
    stage.wait_for(1);
    me.communicator->abort();
  });
}

TEST(double_processes_on_one_gpu_are_refused) {
  run_processes(2, [](int rank, Stage& stage) {
    cudaSetDevice(3);
    if (rank == 0) {
      stage.set_id(new_id());
      ncclComm_t first = join(stage.id(), 2, 0);
      stage.reach(1);
      stage.wait_for(2);
      ncclCommAbort(first);
    } else {
      stage.wait_for(1);
      join(stage.id(), 2, 1, ncclInvalidUsage);
      CHECK_EQUAL(gpu_double::errors(), "two ranks on one GPU\n");
      stage.reach(2);
    }
  });
}

TEST(double_a_process_that_has_given_up_cannot_be_joined) {
  run_processes(2, [](int rank, Stage& stage) {
    cudaSetDevice(rank);
    if (rank == 0) {
      const ncclUniqueId id = new_id();
      stage.set_id(id);
      ncclCommAbort(join(id, 2, 0));
      // Its descriptor is used again, by another communicator.
      ncclComm_t other = join(new_id(), 2, 0);
      stage.reach(1);
      stage.wait_for(2);
      ncclCommAbort(other);
    } else {
      stage.wait_for(1);
      join(stage.id(), 2, 1, ncclRemoteError);
      stage.reach(2);
    }
  });
}

TEST(double_a_process_whose_gpu_hangs_makes_others_hang_until_they_abort) {
  run_connected(3, [](NcclRank& me, Stage& stage) {
    if (me.rank == 1) gpu_double::hold(me.device->stream, true);
    begin_sum(me);
    check_hangs(me);
    if (me.rank != 1) {
      abort_and_drain(me);
      if (me.rank == 0) stage.reach(1);
      return;
    }
    stage.wait_for(1);
    gpu_double::hold(me.device->stream, false);
    check_hangs(me);  // the others will not come back
    abort_and_drain(me);
  });
}

TEST(double_a_killed_process_makes_others_hang_and_they_go_on_without_it) {
  run_connected(3,
                [](NcclRank& me, Stage& stage) {
                  CHECK_EQUAL(me.summed(*me.communicator, 1), 3);
                  if (me.rank == 1) {
                    stage.reach(1);
                    die();
                  }
                  stage.wait_for(1);
                  begin_sum(me);
                  check_hangs(me);
                  CHECK(me.communicator->accepted());  // NCCL says nothing

                  const auto left = me.communicator->shrink({1}, /*has_failed=*/true);
                  left->settle();
                  me.communicator->abort();
                  CHECK_EQUAL(me.summed(*left, float(me.rank)), 2);
                },
                /*killed=*/{1});
}

TEST(double_a_killed_process_is_told_where_a_test_asks_for_it) {
  run_connected(2,
                [](NcclRank& me, Stage& stage) {
                  if (me.rank == 1) {
                    stage.wait_for(1);  // rank 0 is connected too
                    die();
                  }
                  stage.reach(1);
                  gpu_double::tell_of_lost_processes(true);
                  const auto wait_for_ever = [&] {
                    while (me.communicator->accepted()) usleep(1000);
                  };
                  CHECK_THROWS(wait_for_ever(), pycomm::PeerLostError, "NCCL");
                  abort_and_drain(me);
                },
                /*killed=*/{1});
}

TEST(double_a_process_that_is_killed_as_it_moves_data_wedges_nobody) {
  run_connected(3,
                [](NcclRank& me, Stage& stage) {
                  if (me.rank == 1) {
                    const ncclUniqueId id = stage.id();
                    gpu_double::SharedFile::Name name{};
                    std::memcpy(&name, id.internal, sizeof(name));
                    const auto clique = Clique::find(name);
                    for (;;) {
                      clique->locked([&](Clique::Ranks& ranks) {
                        const auto& seats = ranks.seats;
                        if (seats[0].call_count == 0 || seats[2].call_count == 0) return;
                        ranks.seats[1].calls = seats[0].calls;  // it has come to the same call
                        ranks.seats[1].call_count = 1;
                        die();
                      });
                      usleep(1000);
                    }
                  }
                  begin_sum(me);
                  check_hangs(me);
                  abort_and_drain(me);
                },
                /*killed=*/{1});
}
