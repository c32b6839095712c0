#include "collectives/run.h"

#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/all_to_all.h"
#include "collectives/broadcast.h"
#include "collectives/gather.h"
#include "collectives/open.h"
#include "collectives/reduce.h"
#include "collectives/reduce_scatter.h"
#include "collectives/scatter.h"

namespace pycomm {

Task<> run_collective(Context& context, const Operation& operation) {
  switch (operation.kind) {
    case Kind::kAllReduce:
      return all_reduce(context, operation);
    case Kind::kBroadcast:
      return broadcast(context, operation);
    case Kind::kAllGather:
      return all_gather(context, operation);
    case Kind::kReduce:
      return reduce(context, operation);
    case Kind::kGather:
      return gather(context, operation);
    case Kind::kScatter:
      return scatter(context, operation);
    case Kind::kReduceScatter:
      return reduce_scatter(context, operation);
    case Kind::kAllToAll:
      return all_to_all(context, operation);
    case Kind::kAllocateOnDevice:  // never: it is not the host's
    case Kind::kBarrier:
    case Kind::kShutdown:
      break;
  }
  // To have announced the operation together is all that a barrier is.
  return open_operation(context, operation, Announcement::kNotInArena, {});
}

}  // namespace pycomm
