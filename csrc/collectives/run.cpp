#include "collectives/run.h"

#include "collectives/all_gather.h"
#include "collectives/all_reduce.h"
#include "collectives/broadcast.h"
#include "collectives/open.h"

namespace pycomm {

Task<> run_collective(Context& context, const Operation& operation) {
  switch (operation.kind) {
    case Kind::kAllReduce:
      return all_reduce(context, operation);
    case Kind::kBroadcast:
      return broadcast(context, operation);
    case Kind::kAllGather:
      return all_gather(context, operation);
    case Kind::kBarrier:
    case Kind::kShutdown:
      break;
  }
  // To have announced the operation together is all that a barrier is.
  return open_operation(context, operation, Announcement::kNotInArena, {});
}

}  // namespace pycomm
