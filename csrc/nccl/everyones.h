#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "collectives/context.h"
#include "collectives/run.h"
#include "core/operation.h"
#include "core/task.h"

namespace pycomm::nccl {

/// What every rank of a group has brought, by rank: an all-gather of the host. `T` is plain bytes;
/// `name` is for errors.
template <typename T>
Task<std::vector<T>> everyones(Context& context, const T& mine, std::string name) {
  std::vector<T> all(static_cast<std::size_t>(context.size()));
  Operation gather;
  gather.kind = Kind::kAllGather;
  gather.count = sizeof(T);
  gather.input = reinterpret_cast<const std::byte*>(&mine);
  gather.output = reinterpret_cast<std::byte*>(all.data());
  gather.name = std::move(name);
  context.begin_part();
  co_await run_collective(context, gather);
  co_return all;
}

}  // namespace pycomm::nccl
