#include "collectives/lane_exchange.h"

#include "collectives/all_reduce_direct.h"
#include "collectives/all_reduce_gather_fold.h"
#include "collectives/all_reduce_ring.h"

namespace pycomm {

std::unique_ptr<LaneExchange> LaneExchange::make(Algorithm algorithm, LaneStream& stream,
                                                 const Share& share) {
  switch (algorithm) {
    case Algorithm::kRing:
      return std::make_unique<RingExchange>(stream, share);
    case Algorithm::kGatherFold:
      return std::make_unique<GatherFoldExchange>(stream, share);
    case Algorithm::kDirect:
    case Algorithm::kAuto:
    case Algorithm::kGpu:  // these never come here
    case Algorithm::kExactOrder:
    case Algorithm::kGpuExactOrder:
      break;
  }
  return std::make_unique<DirectExchange>(stream, share);
}

}  // namespace pycomm
