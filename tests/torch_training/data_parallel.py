"""DistributedDataParallel and what belongs to it."""

import contextlib
import time
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.distributed.algorithms.ddp_comm_hooks import (
    ddp_zero_hook,
    default_hooks,
    post_localSGD_hook,
    powerSGD_hook,
)
from torch.distributed.algorithms.model_averaging import averagers
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import (
    HierarchicalModelAverager,
)
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.utils.checkpoint import checkpoint

from torch_training.cases import (
    ROUNDING,
    STEPS,
    Network,
    batch,
    case,
    loss_of,
    losses,
    result,
    seeded,
    sgd,
    share,
    whole,
)

SMALL_BUCKETS_MB = 0.002  # several of them
ZERO_WARM_UP = 3  # steps in which overlapped ZeRO learns of the buckets and updates nothing


def network(**options: Any) -> DDP:
    return DDP(seeded(Network), **options)


@case()
def ddp() -> Any:
    """DDP as it comes."""
    module = network()
    return result(losses(module), module)


@case(compared=ROUNDING)
def ddp_all_ranks() -> Any:
    """DDP, all ranks' gradients in every step."""
    module = network()
    return result(losses(module, turns=False), module)


@case()
def ddp_bucket_views() -> Any:
    """DDP with `gradient_as_bucket_view` and several buckets."""
    module = network(gradient_as_bucket_view=True, bucket_cap_mb=SMALL_BUCKETS_MB)
    seen = losses(module)
    sizes = module._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(", ")
    assert len(sizes) > 2, f"one bucket: {sizes}"
    return result(seen, module)


@case()
def ddp_static_graph() -> Any:
    """DDP with `static_graph`, and a layer used twice."""

    class Twice(Network):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return self.last(self.norm(h + self.middle(h + self.middle(h))))

    module = DDP(seeded(Twice), static_graph=True, bucket_cap_mb=SMALL_BUCKETS_MB)
    return result(losses(module), module)


class Branches(nn.Module):
    """A branch that rank 0 leaves out in every other step, and one that nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Network()
        self.branch = nn.Linear(8, 3)
        self.unused = nn.Linear(8, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.body(x)
        return y if dist.get_rank() == 0 and self.calls % 2 else y + self.branch(x)


@case()
def ddp_unused_parameters() -> Any:
    """DDP with `find_unused_parameters`, some unused on one rank only."""
    module = DDP(seeded(Branches), find_unused_parameters=True, bucket_cap_mb=SMALL_BUCKETS_MB)
    return result(losses(module), module)


@case(in_ci=(2,))
def ddp_no_sync() -> Any:
    """DDP, gradients accumulated under `no_sync`."""
    module, seen = network(), []
    optimizer = sgd(module)
    for step in range(STEPS):
        for part in range(3):
            with module.no_sync() if part < 2 else contextlib.nullcontext():
                loss = loss_of(module, 3 * step + part)
                (loss * share(step)).backward()
                seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return result(seen, module)


@case()
def ddp_join() -> Any:
    """DDP under `Join`: every rank has another number of batches."""
    module = network(bucket_cap_mb=SMALL_BUCKETS_MB)
    with Join([module]):
        seen = losses(module, steps=STEPS - 3 * dist.get_rank())
    return {"losses": seen, "state": whole(module.state_dict())}


@case(in_ci=(2,))
def ddp_join_divides_by_those_at_work() -> Any:
    """DDP under `module.join(divide_by_initial_world_size=False)`."""
    module = network()
    with module.join(divide_by_initial_world_size=False):
        seen = losses(module, steps=STEPS - (dist.get_rank() == 0))
    return result(seen, module)


def hooked(hook: Any, **options: Any) -> Any:
    module = network(bucket_cap_mb=SMALL_BUCKETS_MB, **options)
    module.register_comm_hook(None, hook)
    return result(losses(module), module)


@case(in_ci=())
def ddp_hook_all_reduce() -> Any:
    """DDP with `allreduce_hook`."""
    return hooked(default_hooks.allreduce_hook)


@case(in_ci=(2,))
def ddp_hook_fp16() -> Any:
    """DDP with `fp16_compress_hook`."""
    return hooked(default_hooks.fp16_compress_hook)


@case(in_ci=(), refused="BF16 all reduce communication hook required")
def ddp_hook_bf16() -> Any:
    """DDP with `bf16_compress_hook`, on bucket views."""
    return hooked(default_hooks.bf16_compress_hook, gradient_as_bucket_view=True)


@case()
def ddp_hook_custom() -> Any:
    """DDP with a hook that chains `.then` twice and sends to every rank."""

    def hook(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        size = dist.get_world_size()
        mine = bucket.buffer()
        all_ranks = [torch.empty_like(mine) for _ in range(size)]
        gathered = dist.all_gather(all_ranks, mine, async_op=True).get_future()
        summed = gathered.then(lambda done: sum(all_ranks))
        return summed.then(lambda done: done.value() / size)

    return hooked(hook)


@case(in_ci=())
def ddp_hook_wrapped() -> Any:
    """DDP with `fp16_compress_wrapper` around a custom hook."""

    def hook(group: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        reduced = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return reduced.then(lambda done: done.value()[0] / dist.get_world_size())

    return hooked(default_hooks.fp16_compress_wrapper(hook))


@case(compared=ROUNDING)
def ddp_hook_power_sgd() -> Any:
    """DDP with `powerSGD_hook`."""
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=2, start_powerSGD_iter=3, min_compression_rate=1
    )
    module = (
        network()
    )  # one bucket: the hook waits inside callbacks, of which gloo runs two at a time
    module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    seen = losses(module)
    time.sleep(0.2)  # a thread of gloo's that is still in a callback would destroy the group
    return result(seen, module)


@case(in_ci=(), refused="cpu backend doesn't support events")
def ddp_mixed_precision() -> Any:
    """DDP with `mixed_precision` (bfloat16 parameters and buckets)."""
    from torch.nn.parallel.distributed import _MixedPrecision

    bf16 = torch.bfloat16
    module = network(mixed_precision=_MixedPrecision(bf16, bf16, bf16))
    return result(losses(module), module)


@case(in_ci=(2,))
def ddp_autocast() -> Any:
    """DDP under `torch.autocast` to bfloat16."""
    module = network()

    def loss(module: nn.Module, step: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(module, step)

    return result(losses(module, loss=loss), module)


@case(in_ci=(2,))
def ddp_dtypes() -> Any:
    """DDP of double and of bfloat16 parameters."""
    outcome = []
    for dtype in (torch.float64, torch.bfloat16):
        module = DDP(seeded(Network, dtype=dtype))
        outcome.append(result(losses(module), module))
    return outcome


@case()
def ddp_sparse_gradients() -> Any:
    """DDP of an embedding with sparse gradients."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8, sparse=True)
            self.body = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.words((x.abs() * 20).long().clamp(max=49)[:, :3]).sum(1))

    module = DDP(seeded(Words))
    plain_sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    return result(losses(module, plain_sgd), module)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@case()
def ddp_batch_norm_buffers() -> Any:
    """DDP of BatchNorm, whose buffers rank 0 broadcasts."""
    module = DDP(seeded(Normalized))
    return result(losses(module), module)


@case(in_ci=(), refused="SyncBatchNorm layers only work with GPU modules")
def ddp_sync_batch_norm() -> Any:
    """DDP of SyncBatchNorm."""
    module = DDP(nn.SyncBatchNorm.convert_sync_batchnorm(seeded(Normalized)))
    return result(losses(module), module)


@case()
def ddp_subgroup() -> Any:
    """DDP on a subgroup (of two ranks; of every second rank)."""
    size, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, size, size // 2))) for first in range(size // 2)]
    module = network(process_group=groups[rank % (size // 2)])
    return result(losses(module, turns=False), module)


@case(in_ci=(2,))
def ddp_logging_data() -> Any:
    """`DDP._get_ddp_logging_data()`."""
    module = network(bucket_cap_mb=SMALL_BUCKETS_MB)
    losses(module)
    data = module._get_ddp_logging_data()
    assert data["backend_name"] == dist.get_backend(), data["backend_name"]
    sizes = data["rebuilt_bucket_sizes"].split(", ")
    return [data["world_size"], data["rank"], data["num_parameter_tensors"], *map(int, sizes)]


@case(in_ci=())
def ddp_fused_optimizer() -> Any:
    """DDP with the optimizer in its hook (`_register_fused_optim`)."""
    module = network(bucket_cap_mb=SMALL_BUCKETS_MB)
    module._register_fused_optim(torch.optim.SGD, lr=0.05)
    idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    return result(losses(module, idle, before_step=module.zero_grad), module)


@case(in_ci=())
def ddp_two_forwards() -> Any:
    """DDP with two forwards in one backward, and activation checkpoints."""

    class Checkpointed(Network):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            h = h + checkpoint(self.middle, h, use_reentrant=False)
            return self.last(self.norm(h))

    module = DDP(seeded(Checkpointed), static_graph=True)

    def loss(module: nn.Module, step: int) -> Tensor:
        return loss_of(module, step) + loss_of(module, step + 100)

    return result(losses(module, loss=loss), module)


@case()
def zero_redundancy_optimizer() -> Any:
    """DDP with ZeroRedundancyOptimizer(Adam), its state gathered on rank 0 and loaded again."""
    module = network()
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), torch.optim.Adam, lr=1e-2, parameters_as_bucket_view=True
    )
    seen = losses(module, optimizer)
    optimizer.consolidate_state_dict(to=0)
    state = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(state)
    moments = [entry["exp_avg"] for entry in state[0]["state"].values()]
    optimizer.load_state_dict(state[0])  # and takes it apart
    seen += losses(module, optimizer)
    return {**result(seen, module), "moments": moments}


@case(in_ci=())
def zero_redundancy_overlapped() -> Any:
    """ZeroRedundancyOptimizer with `overlap_with_ddp`; gloo, which refuses it: DDP with SGD."""
    hooks = (ddp_zero_hook.hook_with_zero_step, ddp_zero_hook.hook_with_zero_step_interleaved)
    outcome = []
    for with_hook in hooks:
        module = network(gradient_as_bucket_view=True, static_graph=True)
        if dist.get_backend() == "gloo":
            optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
            seen = losses(module, optimizer, steps=ZERO_WARM_UP)
            optimizer.param_groups[0]["lr"] = 0.05
        else:
            optimizer = ZeroRedundancyOptimizer(
                module.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.05
            )
            hook = with_hook(default_hooks.allreduce_hook, module, optimizer)
            module.register_comm_hook(None, hook)
            seen = losses(module, optimizer, steps=ZERO_WARM_UP)
        seen += losses(module, optimizer)
        outcome.append(result(seen, module))
    return outcome


def averaged(averager: Any, group: dist.ProcessGroup | None) -> Any:
    module = network()
    state = post_localSGD_hook.PostLocalSGDState(None, group, start_localSGD_iter=4)
    module.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    return result(losses(module, PostLocalSGDOptimizer(sgd(module), averager)), module)


@case(compared=ROUNDING)
def post_local_sgd() -> Any:
    """PostLocalSGD: gradients within a subgroup, parameters averaged every 3 steps."""
    own, _ = dist.new_subgroups(dist.get_world_size() // 2)
    return averaged(averagers.PeriodicModelAverager(period=3, warmup_steps=4), own)


@case(in_ci=(), world_sizes=(4,), compared=ROUNDING)
def post_local_sgd_hierarchical() -> Any:
    """PostLocalSGD with a HierarchicalModelAverager of two levels."""
    own, _ = dist.new_subgroups(2)
    periods = OrderedDict([(2, 2), (4, 4)])
    return averaged(HierarchicalModelAverager(periods, warmup_steps=4), own)


@case()
def pycomm_optimizer() -> Any:
    """`pycomm.DistributedOptimizer` after `init_process_group("pycomm")`, beside DDP on gloo."""
    if dist.get_backend() != "pycomm":
        module = network()
        return result(losses(module), module.module)
    import pycomm

    assert pycomm.rank() == dist.get_rank() and pycomm.size() == dist.get_world_size()
    module = seeded(Network)
    optimizer = pycomm.DistributedOptimizer(sgd(module), module.named_parameters())
    seen = losses(module, optimizer)
    dist.barrier()  # and torch's calls beside
    return result(seen, module)


@case(in_ci=())
def differentiable_collectives() -> Any:
    """`torch.distributed.nn.functional`: forward and backward of each."""
    from torch.distributed.nn import functional

    size, rank = dist.get_world_size(), dist.get_rank()
    outcome = []

    def differentiate(y: Tensor, x: Tensor) -> None:
        (y * torch.arange(1.0, y.numel() + 1).view_as(y) * share(1)).sum().backward()
        outcome.extend([y, x.grad])

    def source() -> Tensor:
        return (batch(3)[0][: size * 2] * share(0)).clone().requires_grad_()

    for function in (functional.all_reduce, lambda x: functional.broadcast(x, 0)):
        x = source()
        differentiate(function(x), x)
    x = source()
    differentiate(torch.stack(functional.all_gather(x)), x)
    x = source()
    differentiate(functional.reduce(x, 0), x)
    if rank > 0:
        outcome[-2] = None  # the root alone has the sum
    x = source()
    y = functional.all_to_all([torch.empty(8) for _ in range(size)], list(x[:size].unbind()))
    differentiate(torch.stack(y), x)
    x = source()
    differentiate(functional.reduce_scatter(torch.empty(8), list(x[:size].unbind())), x)
    x = source()
    gathered = functional.gather(x, 0)
    differentiate(torch.stack(gathered) if rank == 0 else gathered[0], x)
    return outcome
