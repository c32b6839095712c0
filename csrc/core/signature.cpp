#include "core/signature.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <string_view>

namespace pycomm {
namespace {

/// One step of a multiply-and-fold hash (as in wyhash): every input bit reaches every output bit.
std::uint64_t mix(std::uint64_t state, std::uint64_t word) {
  const auto product = static_cast<unsigned __int128>(state ^ word) * 0x9E3779B97F4A7C15u;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64) ^
         0xD6E8FEB86659FD93u;
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

bool has_root(Kind kind) {
  return kind == Kind::kBroadcast || kind == Kind::kReduce || kind == Kind::kGather ||
         kind == Kind::kScatter;
}

std::string short_number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

std::string name_of_call(const Signature& signature) {
  const auto end = std::find(signature.name.begin(), signature.name.end(), '\0');
  return {signature.name.begin(), end};
}

}  // namespace

Signature Signature::of(const Operation& operation, std::uint64_t sequence, std::uint64_t history) {
  Signature signature;
  signature.sequence = sequence;
  signature.history = history;
  signature.counts_hash = hash_of_counts(operation);
  signature.count = signature.counts_hash == 0 ? operation.count : 0;
  signature.divisor = operation.divisor;
  signature.prescale = operation.prescale;
  signature.postscale = operation.postscale;
  signature.root = operation.root;
  signature.kind = operation.kind;
  signature.dtype = operation.dtype;
  signature.op = operation.op;
  signature.algorithm = operation.algorithm;
  signature.dim_count = static_cast<std::int8_t>(operation.shape.count);
  for (int i = 0; i < std::min(operation.shape.count, Shape::kMaxDims); ++i) {
    signature.dims[i] = operation.shape.dims[i];
  }
  signature.name_hash = hash_of(operation.name);
  std::memcpy(signature.name.data(), operation.name.data(),
              std::min(operation.name.size(), kMaxName));
  return signature;
}

std::uint64_t Signature::hash() const {
  std::uint64_t state = mix(0x2545F4914F6CDD1Du, sequence);
  for (const std::uint64_t word :
       {history, count, static_cast<std::uint64_t>(divisor), std::bit_cast<std::uint64_t>(prescale),
        std::bit_cast<std::uint64_t>(postscale), counts_hash, name_hash,
        static_cast<std::uint64_t>(root) << 40 | static_cast<std::uint64_t>(kind) << 32 |
            static_cast<std::uint64_t>(dtype) << 24 | static_cast<std::uint64_t>(op) << 16 |
            static_cast<std::uint64_t>(algorithm) << 8 | static_cast<std::uint8_t>(dim_count)}) {
    state = mix(state, word);
  }
  for (int i = 0; i < std::min<int>(dim_count, Shape::kMaxDims); ++i) {
    state = mix(state, static_cast<std::uint64_t>(dims[i]));
  }
  return state;
}

std::string Signature::describe() const {
  std::string text = name_of(kind);
  const std::string given = name_of_call(*this);
  if (!given.empty()) text += " '" + given + "'";
  if (kind == Kind::kBarrier || kind == Kind::kShutdown) return text;
  text += counts_hash == 0 ? " of " + std::to_string(count) : " of blocks of different lengths of";
  text += std::string(" ") + name_of(dtype);
  if (dim_count >= 0) {
    text += ", shape (";
    const bool cut = dim_count > Shape::kMaxDims;  // the last entry then stands for several
    for (int i = 0; i < (cut ? Shape::kMaxDims - 1 : dim_count); ++i) {
      text += (i > 0 ? ", " : "") + std::to_string(dims[i]);
    }
    text += dim_count == 1 ? ",)" : cut ? ", ...)" : ")";
  }
  if (reduces(kind)) {
    text += std::string(", ") + name_of(op);
    if (divisor > 1) text += " divided by " + std::to_string(divisor);
    if (prescale != 1) text += ", inputs times " + short_number(prescale);
    if (postscale != 1) text += ", result times " + short_number(postscale);
    if (algorithm != Algorithm::kAuto) text += std::string(", ") + name_of(algorithm);
  }
  if (has_root(kind)) text += ", root " + std::to_string(root);
  return text;
}

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
         " made " + ours + ", rank " + std::to_string(other_rank) + " made " + theirs +
         ".\n  Every rank must issue the same collectives in the same order, with the same shape, "
         "dtype, op and root.";
}

}  // namespace pycomm
