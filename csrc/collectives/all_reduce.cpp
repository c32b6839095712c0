#include "collectives/all_reduce.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "collectives/all_reduce_gather_fold.h"
#include "collectives/all_reduce_hierarchical.h"
#include "collectives/all_reduce_window.h"
#include "collectives/cost.h"
#include "collectives/open.h"

namespace pycomm {
namespace {

/// The one place that turns kAuto and kExactOrder into an algorithm. The same on all ranks: the
/// operation's signature is compared, the tuning was agreed upon by init.
Algorithm resolve(const Context& context, const Operation& operation) {
  const bool in_order = operation.algorithm == Algorithm::kExactOrder;
  if (operation.algorithm != Algorithm::kAuto && !in_order) return operation.algorithm;
  const Algorithm tuned = context.tuning.algorithm;
  if (tuned != Algorithm::kAuto && !(in_order && tuned == Algorithm::kRing)) return tuned;
  return choose_algorithm(context.tuning.cost, context.job_of(operation));
}

/// Gather and fold for a small operation: every rank folds what the opening messages brought.
Task<> all_reduce_riding(Context& context, const Operation& operation) {
  const std::size_t bytes = operation.count * size_of(operation.dtype);
  const DType wire = wire_dtype(context.job_of(operation), Algorithm::kGatherFold);
  const bool sends_input = context.placement.most_ranks() == 1;
  std::span<const std::byte> payload;
  if (!sends_input) payload = {operation.input, bytes};
  HostSum sum{
      operation.count * size_of(wire), [&](std::byte* target) {
        if (sends_input) {
          if (bytes > 0) std::memcpy(target, operation.input, bytes);
          return;
        }
        std::vector<const std::byte*> sources;
        for (int peer = 0; peer < context.window.local_size(); ++peer) {
          sources.push_back(context.window.announced_payload(peer, context.sequence, bytes));
        }
        fold({operation.dtype, wire, operation.op, 1, operation.prescale}, target, sources,
             operation.count);
      }};
  const std::byte* const sums =
      co_await open_with_sums(context, operation, payload, std::move(sum));
  const FoldSpec spec{wire,
                      operation.dtype,
                      operation.op,
                      std::max<std::int64_t>(1, operation.divisor),
                      sends_input ? operation.prescale : 1,
                      operation.postscale};
  fold_gathered(spec, operation.output, sums, operation.count, context.host(),
                context.host_count());
}

}  // namespace

Task<> all_reduce(Context& context, const Operation& operation) {
  if (context.host_count() == 1) {
    if (context.announced < context.sequence) announce_all_reduce(context, operation);
    Window::AllAnnounced announced(context.window, context.sequence, /*compare=*/true);
    co_await until(announced);
    co_await all_reduce_window(context, operation);
    co_return;
  }
  const Algorithm algorithm = resolve(context, operation);
  if (algorithm == Algorithm::kGatherFold && rides(context.job_of(operation))) {
    co_await all_reduce_riding(context, operation);
  } else {
    co_await open_operation(context, operation, in_place_offset(context, operation), {});
    co_await all_reduce_hierarchical(context, operation, algorithm);
  }
}

}  // namespace pycomm
