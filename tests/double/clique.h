#pragma once

#include <nccl.h>
#include <pthread.h>

#include <array>
#include <cstddef>
#include <memory>
#include <utility>

#include "double/shared_file.h"

namespace gpu_double {

enum class What { kAllReduce, kReduce, kReduceScatter, kBroadcast, kAllGather, kSend, kRecv };

/// One call, as a rank made it. Read by other processes: no addresses, but offsets in the memory of
/// its rank.
struct Call {
  What what;
  std::size_t input;
  std::size_t output;
  std::size_t count;
  ncclDataType_t type;
  ncclRedOp_t op = ncclSum;
  int peer = 0;  // or root
  bool scales = false;
  double factor = 1;
  bool done = false;

  bool is_message() const { return what == What::kSend || what == What::kRecv; }
  bool agrees_with(const Call& other) const {
    return what == other.what && count == other.count && type == other.type && op == other.op &&
           peer == other.peer && scales == other.scales && factor == other.factor;
  }
};

constexpr int kMostRanks = 8;  // one a GPU
constexpr std::size_t kMostCalls = 1024;

/// What the other ranks of a communicator see of one.
struct Seat {
  bool taken;
  int device;
  SharedFile::Name memory;
  ncclResult_t error;
  /// What its stream has come to: one call, or those of an NCCL group; none: nothing.
  std::size_t call_count;
  std::array<Call, kMostCalls> calls;
  /// Windows that it has asked for, and the bytes of the last two: it cannot ask for a third
  /// before everyone has asked for the first.
  std::size_t windows;
  std::array<std::size_t, 2> window_bytes;
};

/// The ranks of a communicator, threads of one process or processes of one host: a file that each
/// of them maps. A rank that is killed leaves its seat as it is, so that calls with it hang; if it
/// was killed while it moved data, nothing moves any more.
class Clique {
 public:
  /// What lies in the file.
  struct Ranks {
    pthread_mutex_t mutex;
    bool broken;
    int size;
    std::array<Seat, kMostRanks> seats;
    /// Those made by leaving out ranks, by which ones: bit r is rank r.
    std::array<SharedFile::Name, 1 << kMostRanks> without;

    bool complete() const;
    bool has_window(std::size_t number) const;
    bool windows_differ(std::size_t number) const;
  };

  Clique();
  /// Null: whoever made it has closed it, or is gone.
  static std::shared_ptr<Clique> find(const SharedFile::Name& name);
  ~Clique();
  Clique(const Clique&) = delete;
  Clique& operator=(const Clique&) = delete;

  /// Others find it as long as this object lives.
  SharedFile::Name name() const { return file_.name(); }

  /// Runs `action(ranks)` while no other rank does, in any process.
  template <typename Action>
  auto locked(Action action) {
    const Lock lock(*ranks_);
    return action(*ranks_);
  }

  /// How many of them this process has mapped.
  static int open_count();

 private:
  explicit Clique(SharedFile file);

  class Lock {
   public:
    explicit Lock(Ranks& ranks);
    ~Lock();
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    Ranks& ranks_;
  };

  const SharedFile file_;
  Ranks* const ranks_;
};

}  // namespace gpu_double
