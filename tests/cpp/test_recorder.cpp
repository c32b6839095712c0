#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "core/recorder.h"

namespace {

using pycomm::Operation;
using pycomm::Record;
using pycomm::Recorder;

/// In zeroed memory, as an arena gives it.
struct Fresh {
  Fresh() : recorder(new (memory.data()) Recorder) {}
  std::vector<std::uint64_t> memory = std::vector<std::uint64_t>(sizeof(Recorder) / 8 + 1);
  Recorder* recorder;
};

Record record_of(std::uint64_t count) {
  Operation operation;
  operation.kind = pycomm::Kind::kAllReduce;
  operation.dtype = pycomm::DType::kFloat32;
  operation.count = count;
  operation.name = "bucket 3";
  operation.site = "train.py:31";
  Record record;
  record.queued_ns = static_cast<std::int64_t>(count);
  record.bytes = count;
  record.signature.assign(operation, 0, 0);
  return record;
}

TEST(a_record_goes_through_its_states) {
  Fresh fresh;
  CHECK_EQUAL(fresh.recorder->latest(), 0u);
  CHECK(!fresh.recorder->read(0));
  CHECK(!fresh.recorder->read(1));
  const auto number = fresh.recorder->begin(record_of(4));
  CHECK_EQUAL(number, 1u);
  CHECK_EQUAL(fresh.recorder->read(number)->state, Record::State::kQueued);
  fresh.recorder->start(number, /*now_ns=*/7, /*sequence=*/12, /*hash=*/0);
  CHECK_EQUAL(fresh.recorder->read(number)->state, Record::State::kRunning);
  fresh.recorder->end(number, 9, /*failed=*/false, 12, 99);
  const auto ended = *fresh.recorder->read(number);
  CHECK_EQUAL(ended.state, Record::State::kDone);
  CHECK_EQUAL(ended.started_ns, 7);
  CHECK_EQUAL(ended.ended_ns, 9);
  CHECK_EQUAL(ended.signature.sequence, 12u);
  CHECK_EQUAL(ended.hash, 99u);
  CHECK_EQUAL(ended.describe(), std::string("all_reduce 'bucket 3' of 4 float32, SUM"));
  CHECK_EQUAL(ended.signature.place(), std::string(" at train.py:31"));
}

TEST(the_last_ones_are_kept) {
  Fresh fresh;
  for (std::uint64_t i = 1; i <= Recorder::kRecords + 5; ++i) fresh.recorder->begin(record_of(i));
  CHECK_EQUAL(fresh.recorder->latest(), Recorder::kRecords + 5);
  CHECK(!fresh.recorder->read(5));
  CHECK_EQUAL(fresh.recorder->read(6)->bytes, 6u);
  // What ends after it was replaced changes nobody else's record.
  fresh.recorder->end(5, 1, /*failed=*/true, 0, 0);
  CHECK_EQUAL(fresh.recorder->read(Recorder::kRecords + 5)->state, Record::State::kQueued);
}

TEST(what_has_not_ended_is_found_behind_what_has) {
  Fresh fresh;
  CHECK(!fresh.recorder->first_unfinished());
  for (std::uint64_t i = 1; i <= 3; ++i) fresh.recorder->begin(record_of(i));
  fresh.recorder->end(1, 5, /*failed=*/false, 0, 0);
  fresh.recorder->end(3, 5, /*failed=*/true, 0, 0);
  CHECK_EQUAL(fresh.recorder->first_unfinished()->bytes, 2u);
  fresh.recorder->end(2, 6, /*failed=*/false, 0, 0);
  CHECK(!fresh.recorder->first_unfinished());
}

TEST(a_reader_gets_whole_records_while_threads_write) {
  Fresh fresh;
  constexpr int kEnough = 1000;
  std::atomic<bool> enough{false};
  std::vector<std::thread> writers;
  for (int thread = 0; thread < 2; ++thread) {
    writers.emplace_back([&] {
      for (std::uint64_t i = 0; !enough.load(std::memory_order_relaxed); ++i) {
        const auto number = fresh.recorder->begin(record_of(i));
        fresh.recorder->end(number, static_cast<std::int64_t>(i), false, i, i);
      }
    });
  }
  for (int read = 0; read < kEnough;) {
    const auto record = fresh.recorder->read(fresh.recorder->latest());
    if (!record) continue;
    ++read;
    CHECK_EQUAL(static_cast<std::uint64_t>(record->queued_ns), record->bytes);
    CHECK_EQUAL(record->signature.count, record->bytes);
    CHECK(record->hash == 0 || record->hash == record->bytes);
  }
  enough = true;
  for (auto& writer : writers) writer.join();
}

}  // namespace
