#include "transport/trace.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string_view>
#include <type_traits>

#include "core/error.h"
#include "core/system_error.h"
#include "transport/descriptor.h"

namespace pycomm {
namespace {

/// Ends with the version of what follows.
constexpr std::string_view kBeginning = "pycomm trace 2\n";

Descriptor opened(const std::string& path, int flags) {
  Descriptor file(open(path.c_str(), flags | O_CLOEXEC, S_IRUSR | S_IWUSR));
  if (file.get() < 0) throw_system_error("open " + path, "");
  return file;
}

template <typename T>
void append(std::string& bytes, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

/// Takes values off the front of a file's content.
class Reader {
 public:
  Reader(const std::string& path, std::string_view bytes) : path_(path), left_(bytes) {}

  std::string_view take(std::uint64_t bytes) {
    if (bytes > left_.size()) fail();
    const auto taken = left_.substr(0, bytes);
    left_.remove_prefix(bytes);
    return taken;
  }

  template <typename T>
  T take() {
    static_assert(std::is_trivially_copyable_v<T>);
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }

  bool over() const { return left_.empty(); }

  [[noreturn]] void fail() const {
    throw CommError("trace: " + path_ +
                    " is not a whole trace of this version of pycomm.\n  Read it with the version "
                    "that wrote it.");
  }

 private:
  const std::string& path_;
  std::string_view left_;
};

void end_texts(Identity& identity) {
  identity.host_name.back() = '\0';
  identity.job.back() = '\0';
}

}  // namespace

RankTrace read_page(const ProcessPage& page) {
  RankTrace trace;
  trace.identity = page.identity;
  end_texts(trace.identity);
  trace.gone = page.life.owner_died();
  trace.left = page.leaving.load(std::memory_order_acquire);
  const std::uint64_t latest = page.recorder.latest();
  const std::uint64_t first = latest > Recorder::kRecords ? latest - Recorder::kRecords + 1 : 1;
  for (std::uint64_t number = first; number <= latest; ++number) {
    if (const auto record = page.recorder.read(number)) trace.records.push_back(*record);
  }
  return trace;
}

RankTrace read_page_at(const std::string& path) {
  const Descriptor file = opened(path, O_RDONLY);
  struct stat status{};
  const bool long_enough =
      fstat(file.get(), &status) == 0 && status.st_size >= static_cast<off_t>(sizeof(ProcessPage));
  void* const mapped = long_enough ? mmap(nullptr, sizeof(ProcessPage), PROT_READ, MAP_SHARED,
                                          file.get(), /*offset=*/0)
                                   : MAP_FAILED;
  if (mapped == MAP_FAILED) throw CommError("trace: " + path + " is no memory of pycomm.");
  const auto& page = *static_cast<const ProcessPage*>(mapped);
  const bool known = page.magic.load(std::memory_order_acquire) == Identity::kMagic;
  RankTrace trace;
  if (known) trace = read_page(page);
  munmap(mapped, sizeof(ProcessPage));
  if (!known) {
    throw CommError("trace: " + path +
                    " belongs to another version of pycomm, or to a rank that "
                    "is still starting.");
  }
  return trace;
}

void write_trace(const std::string& path, const Trace& trace) {
  std::string bytes(kBeginning);
  append(bytes, std::uint64_t{sizeof(Record)});
  append(bytes, trace.now_ns);
  append(bytes, std::uint64_t{trace.reason.size()});
  bytes += trace.reason;
  append(bytes, std::uint64_t{trace.ranks.size()});
  for (const RankTrace& rank : trace.ranks) {
    append(bytes, rank.identity);
    append(bytes, std::uint64_t{rank.gone} | std::uint64_t{rank.left} << 1);
    append(bytes, std::uint64_t{rank.records.size()});
    for (const Record& record : rank.records) append(bytes, record);
  }
  const std::string temporary = path + "." + std::to_string(getpid()) + ".new";
  try {
    const Descriptor file = opened(temporary, O_WRONLY | O_CREAT | O_TRUNC);
    for (std::size_t written = 0; written < bytes.size();) {
      const ssize_t part = write(file.get(), bytes.data() + written, bytes.size() - written);
      if (part < 0 && errno == EINTR) continue;
      if (part < 0) throw_system_error("write to " + temporary, "");
      written += static_cast<std::size_t>(part);
    }
    if (rename(temporary.c_str(), path.c_str()) != 0) throw_system_error("rename to " + path, "");
  } catch (...) {
    unlink(temporary.c_str());
    throw;
  }
}

Trace read_trace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw_system_error("open " + path, "");
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  Reader reader(path, bytes);
  if (reader.take(std::min(bytes.size(), kBeginning.size())) != kBeginning) reader.fail();
  if (reader.take<std::uint64_t>() != sizeof(Record)) reader.fail();
  Trace trace;
  trace.now_ns = reader.take<std::int64_t>();
  trace.reason = reader.take(reader.take<std::uint64_t>());
  const auto ranks = reader.take<std::uint64_t>();
  for (std::uint64_t i = 0; i < ranks; ++i) {
    RankTrace& rank = trace.ranks.emplace_back();
    rank.identity = reader.take<Identity>();
    end_texts(rank.identity);
    const auto state = reader.take<std::uint64_t>();
    rank.gone = state & 1;
    rank.left = state & 2;
    const auto records = reader.take<std::uint64_t>();
    for (std::uint64_t k = 0; k < records; ++k) rank.records.push_back(reader.take<Record>());
  }
  if (!reader.over()) reader.fail();
  return trace;
}

}  // namespace pycomm
