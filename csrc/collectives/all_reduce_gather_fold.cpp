#include "collectives/all_reduce_gather_fold.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "collectives/segments.h"

namespace pycomm {

void fold_gathered(const FoldSpec& spec, std::byte* result, const std::byte* gathered,
                   std::size_t count, int host, int hosts) {
  const std::size_t bytes = count * size_of(spec.source_dtype);
  std::vector<const std::byte*> sources(static_cast<std::size_t>(hosts));
  for (int back = 0; back < hosts; ++back) {
    const int from = (host - back + hosts) % hosts;
    sources[static_cast<std::size_t>(from)] = gathered + static_cast<std::size_t>(back) * bytes;
  }
  fold(spec, result, sources, count);
}

void GatherFoldExchange::begin() {
  std::memcpy(share_.received, share_.host_sum, share_.count * share_.wire());
}

Task<> GatherFoldExchange::finish() {
  const int hosts = stream_.lane().host_count();
  const int host = stream_.lane().host;
  const std::size_t wire = share_.wire();
  for (int distance = 1; distance < hosts; distance *= 2) {
    const auto sums = static_cast<std::size_t>(std::min(distance, hosts - distance));
    std::byte* const target =
        share_.received + static_cast<std::size_t>(distance) * share_.count * wire;
    const std::size_t count = sums * share_.count;
    const std::size_t segments = segments_of(count, 1, wire);
    for (std::size_t i = 0; i < segments; ++i) {
      const Range range = segment({0, count}, segments, i);
      const std::size_t begin = range.begin * wire;
      const std::size_t bytes = range.count() * wire;
      stream_.send(host + distance, {share_.received + begin, bytes});
      stream_.receive(host - distance, {target + begin, bytes});
    }
    auto arrived = stream_.received(stream_.last_receive());
    co_await until(arrived);
  }
  fold_gathered(share_.fold, share_.result, share_.received, share_.count, host, hosts);
}

}  // namespace pycomm
