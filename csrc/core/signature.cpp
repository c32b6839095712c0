#include "core/signature.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <string_view>

namespace pycomm {
namespace {

/// How pycomm/memory.py begins the name of a call in place on memory that is not row-major.
constexpr std::string_view kMemoryOrder = "memory order";

/// Both halves of a 128-bit product: every input bit reaches every output bit (as in wyhash).
std::uint64_t product(std::uint64_t a, std::uint64_t b) {
  const auto wide = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(wide) ^ static_cast<std::uint64_t>(wide >> 64);
}

/// One step of a hash over a sequence of words.
std::uint64_t mix(std::uint64_t state, std::uint64_t word) {
  return product(state ^ word, 0x9E3779B97F4A7C15u) ^ 0xD6E8FEB86659FD93u;
}

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t state = text.size();
  for (std::size_t i = 0; i < text.size(); i += 8) {
    std::uint64_t word = 0;
    std::memcpy(&word, &text[i], std::min<std::size_t>(8, text.size() - i));
    state = mix(state, word);
  }
  return state;
}

/// What must be equal on all ranks of blocks of different lengths: for an all-to-all only that
/// there are such, since each rank sends and receives others.
std::uint64_t hash_of_counts(const Operation& operation) {
  if (operation.input_counts.empty() && operation.output_counts.empty()) return 0;
  std::uint64_t state = 1;
  if (operation.kind == Kind::kAllToAll) return state;
  for (const std::size_t count : operation.output_counts) state = mix(state, count);
  return state;
}

bool has_elements(Kind kind) {
  return kind != Kind::kBarrier && kind != Kind::kShutdown && kind != Kind::kAllocateOnDevice;
}

bool has_root(Kind kind) {
  return kind == Kind::kBroadcast || kind == Kind::kReduce || kind == Kind::kGather ||
         kind == Kind::kScatter;
}

std::string short_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

template <std::size_t kSize>
std::string text_in(const std::array<char, kSize>& field) {
  return {field.begin(), std::find(field.begin(), field.end(), '\0')};
}

/// Cut off if need be.
template <std::size_t kSize>
void write_text(std::array<char, kSize>& field, std::string_view text) {
  const std::size_t length = std::min(text.size(), kSize);
  if (length > 0) std::memcpy(field.data(), text.data(), length);
  if (length < kSize) field[length] = '\0';
}

std::string name_of_call(const Signature& signature) { return text_in(signature.name); }

}  // namespace

Signature Signature::of(const Operation& operation, std::uint64_t sequence, std::uint64_t history) {
  Signature signature;
  signature.assign(operation, sequence, history);
  return signature;
}

void Signature::assign(const Operation& operation, std::uint64_t sequence_in,
                       std::uint64_t history_in) {
  sequence = sequence_in;
  history = history_in;
  counts_hash = hash_of_counts(operation);
  count = counts_hash == 0 && has_elements(operation.kind) ? operation.count : 0;
  divisor = operation.divisor;
  prescale = operation.prescale;
  postscale = operation.postscale;
  root = operation.root;
  kind = operation.kind;
  dtype = operation.dtype;
  op = operation.op;
  algorithm = operation.algorithm;
  dim_count = static_cast<std::int8_t>(operation.shape.count);
  for (int i = 0; i < std::min(operation.shape.count, Shape::kMaxDims); ++i) {
    dims[i] = operation.shape.dims[i];
  }
  // Why a rank leaves is told, and no difference: others may leave for another reason.
  name_hash = operation.kind == Kind::kShutdown ? 0 : hash_of(operation.name);
  write_text(name, operation.name);
  write_text(site, operation.site == nullptr ? "" : operation.site);
}

std::uint64_t Signature::hash() const {
  // Pairs of words, each with keys of its own, so that the products do not wait for each other.
  std::uint64_t state = product(sequence ^ 0x2545F4914F6CDD1Du, history ^ 0x9E3779B97F4A7C15u) ^
                        product(count ^ 0xA0761D6478BD642Fu,
                                static_cast<std::uint64_t>(divisor) ^ 0xE7037ED1A0B428DBu) ^
                        product(std::bit_cast<std::uint64_t>(prescale) ^ 0x8EBC6AF09C88C6E3u,
                                std::bit_cast<std::uint64_t>(postscale) ^ 0x589965CC75374CC3u) ^
                        product(counts_hash ^ 0x1D8E4E27C47D124Fu, name_hash ^ 0xEB44ACCAB455D165u);
  state = mix(
      state, static_cast<std::uint64_t>(root) << 40 | static_cast<std::uint64_t>(kind) << 32 |
                 static_cast<std::uint64_t>(dtype) << 24 | static_cast<std::uint64_t>(op) << 16 |
                 static_cast<std::uint64_t>(algorithm) << 8 | static_cast<std::uint8_t>(dim_count));
  for (int i = 0; i < std::min<int>(dim_count, Shape::kMaxDims); ++i) {
    state = mix(state, static_cast<std::uint64_t>(dims[i]));
  }
  return state;
}

std::string Signature::describe() const {
  std::string text = name_of(kind);
  const std::string given = name_of_call(*this);
  if (kind == Kind::kShutdown) return given.empty() ? text : text + " after " + given;
  if (!given.empty()) text += " '" + given + "'";
  if (!has_elements(kind)) return text;
  text += " of " + elements();
  if (reduces(kind)) {
    text += std::string(", ") + name_of(op);
    if (divisor > 1) text += " divided by " + std::to_string(divisor);
    if (prescale != 1) text += ", inputs times " + short_number(prescale);
    if (postscale != 1) text += ", result times " + short_number(postscale);
    if (algorithm != Algorithm::kAuto && algorithm != Algorithm::kGpu) {
      text += std::string(", ") + name_of(algorithm);
    }
  }
  if (has_root(kind)) text += ", root " + std::to_string(root);
  if (is_on_gpus(algorithm)) text += ", on GPUs";
  return text;
}

std::string Signature::elements() const {
  std::string text = (counts_hash == 0 ? std::to_string(count) : "blocks of different lengths of") +
                     " " + name_of(dtype);
  if (dim_count < 0) return text;
  const bool cut = dim_count > Shape::kMaxDims;  // the last entry then stands for several
  text += ", shape (";
  for (int i = 0; i < (cut ? Shape::kMaxDims - 1 : dim_count); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
  }
  return text + (dim_count == 1 ? ",)" : cut ? ", ...)" : ")");
}

std::string Signature::place() const {
  const std::string text = text_in(site);
  return text.empty() ? "" : " at " + text;
}

namespace {

std::string remedy(const Signature& mine, const Signature& other) {
  const auto has_left = [](const Signature& signature) {
    return signature.kind == Kind::kShutdown;
  };
  if (has_left(mine) != has_left(other)) {
    if (!name_of_call(has_left(mine) ? mine : other).empty()) {
      return "The one that leaves has failed: read its log first.";
    }
    return "One has finished while the other goes on: every rank must make the same number of "
           "calls. Give each as many batches, or let pycomm.join() (of DistributedDataParallel: "
           "its join()) take part for those that end early.";
  }
  if (is_on_gpus(mine.algorithm) != is_on_gpus(other.algorithm)) {
    return "A call has its tensors on GPUs on every rank, or on none: pass t.cuda(), or t.cpu(), "
           "everywhere.";
  }
  const auto is_ordered = [](const Signature& signature) {
    return name_of_call(signature).starts_with(kMemoryOrder);
  };
  if (mine.kind == other.kind && mine.count == other.count &&
      (is_ordered(mine) || is_ordered(other))) {
    return "The elements lie in different orders in the ranks' memory, and a call in place pairs "
           "them as they lie (no order named: row-major). Pass t.contiguous() on every rank.";
  }
  return "Every rank must issue the same collectives in the same order, with the same shape, "
         "dtype, op and root.";
}

}  // namespace

std::string describe_mismatch(int rank, const Signature& mine, int other_rank,
                              const Signature& other) {
  std::string ours = mine.describe();
  std::string theirs = other.describe();
  if (ours == theirs) {
    const bool same_position = mine.sequence == other.sequence;
    ours += same_position ? " after other calls" : " as call #" + std::to_string(mine.sequence);
    theirs += same_position ? " after other calls" : " as call #" + std::to_string(other.sequence);
  }
  return "call #" + std::to_string(mine.sequence) + " differs: rank " + std::to_string(rank) +
         " made " + ours + mine.place() + ", rank " + std::to_string(other_rank) + " made " +
         theirs + other.place() + ".\n  " + remedy(mine, other);
}

}  // namespace pycomm
