#include "group/journal.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "core/clock.h"
#include "core/rank_list.h"

namespace pycomm {
namespace {

/// An operation may be announced a little before it is counted, or after.
std::uint64_t current(const Context& context) {
  return std::max(context.sequence, context.announced);
}

/// 0 until the group has been told of the current operation.
std::uint64_t hash_of_current(const Context& context) {
  return context.announced < current(context) ? 0 : context.history;
}

}  // namespace

Journal::Journal(Recorder& recorder, int tag, const std::vector<int>& ranks, int world_size)
    : recorder_(recorder), ranks_(ranks), name_("ranks " + rank_list(ranks)) {
  std::vector<int> all(static_cast<std::size_t>(world_size));
  std::iota(all.begin(), all.end(), 0);
  const bool is_world = ranks == all;
  // Groups without a common rank may have the same tag, and those of the same ranks have not.
  key_ = std::hash<std::string>()(name_ + " " + std::to_string(tag));
  // The first group of a job is the world itself.
  const bool is_first = tag == Channel::kControlTag + 1;
  if (is_world) name_ = is_first ? "world" : "a group of all, tag " + std::to_string(tag);
  if (name_.size() > Record::kMaxGroupName)
    name_.replace(Record::kMaxGroupName - 3, name_.npos, "...");
}

Record Journal::prepared() const {
  Record record;
  record.queued_ns = Clock::now_ns();
  record.group = key_;
  std::copy(name_.begin(), name_.end(), record.group_name.begin());
  return record;
}

Record Journal::record_of(const Operation& operation) const {
  Record record = prepared();
  record.signature.assign(operation, /*sequence=*/0, /*history=*/0);
  record.bytes = operation.count * size_of(operation.dtype);
  return record;
}

Journal::Entry Journal::queue(const Operation& operation) const {
  return recorder_.begin(record_of(operation));
}

Journal::Entry Journal::begin(const Operation& operation, const Context& context) const {
  Record record = record_of(operation);
  record.state = Record::State::kRunning;
  record.started_ns = record.queued_ns;
  record.signature.sequence = context.sequence + 1;
  return recorder_.begin(record);
}

Journal::Entry Journal::queue(const Transfer& transfer) const {
  Record record = prepared();
  record.what = transfer.direction == Transfer::Direction::kSend ? Record::What::kSend
                                                                 : Record::What::kReceive;
  Operation elements;
  elements.kind = Kind::kBroadcast;  // what has elements, and nothing else
  elements.dtype = transfer.dtype;
  elements.count = transfer.count;
  elements.shape = transfer.shape;
  elements.site = transfer.site;
  record.signature.assign(elements, 0, 0);
  record.state = Record::State::kRunning;
  record.started_ns = record.queued_ns;
  record.bytes = transfer.bytes();
  record.peer = transfer.peer;
  if (transfer.peer >= 0) record.peer_in_world = ranks_[static_cast<std::size_t>(transfer.peer)];
  record.tag = transfer.tag;
  return recorder_.begin(record);
}

void Journal::start(Entry entry, const Context& context) const {
  recorder_.start(entry, Clock::now_ns(), current(context), hash_of_current(context));
}

void Journal::end(Entry entry, const Context& context, bool failed) const {
  recorder_.end(entry, Clock::now_ns(), failed, current(context), hash_of_current(context));
}

void Journal::end(Entry entry, bool failed) const {
  recorder_.end(entry, Clock::now_ns(), failed, 0, 0);
}

}  // namespace pycomm
