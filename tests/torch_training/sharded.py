"""FullyShardedDataParallel, fully_shard, and both with their state dicts."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    LocalStateDictConfig,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from torch_training.cases import (
    ROUNDING,
    STEPS,
    Network,
    case,
    loss_of,
    losses,
    result,
    seeded,
    sgd,
    share,
    whole,
)

BF16 = torch.bfloat16


def fsdp(**options: Any) -> FSDP:
    """Two units: the middle layers and the rest."""
    return FSDP(
        seeded(Network),
        auto_wrap_policy=ModuleWrapPolicy({nn.Sequential}),
        device_id=torch.device("cpu"),
        **options,
    )


def trained(module: FSDP, **options: Any) -> Any:
    seen = losses(module, **options)
    with FSDP.summon_full_params(module):
        return {"losses": seen, "state": [p.detach().clone() for p in module.parameters()]}


@case()
def fsdp_full_shard() -> Any:
    """FSDP1 FULL_SHARD."""
    return trained(fsdp())


@case(in_ci=())
def fsdp_shard_grad_op() -> Any:
    """FSDP1 SHARD_GRAD_OP, `use_orig_params`."""
    strategy = ShardingStrategy.SHARD_GRAD_OP
    return trained(fsdp(sharding_strategy=strategy, use_orig_params=True))


@case(in_ci=())
def fsdp_no_shard() -> Any:
    """FSDP1 NO_SHARD."""
    return trained(fsdp(sharding_strategy=ShardingStrategy.NO_SHARD))


@case(world_sizes=(4,))
def fsdp_hybrid_shard() -> Any:
    """FSDP1 HYBRID_SHARD on a 2 x 2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return trained(fsdp(sharding_strategy=ShardingStrategy.HYBRID_SHARD, device_mesh=mesh))


@case(in_ci=())
def fsdp_mixed_precision() -> Any:
    """FSDP1 with bfloat16 parameters, reductions and buffers."""
    return trained(fsdp(mixed_precision=MixedPrecision(BF16, BF16, BF16)))


@case(in_ci=())
def fsdp_no_sync_and_clipping() -> Any:
    """FSDP1, gradients accumulated under `no_sync`, `clip_grad_norm_`."""
    module, seen = fsdp(), []
    optimizer = sgd(module)
    for step in range(STEPS):
        for part in range(2):
            with module.no_sync() if part == 0 else contextlib.nullcontext():
                loss = loss_of(module, 2 * step + part)
                (loss * share(step)).backward()
                seen.append(loss.item())
        module.clip_grad_norm_(1e6)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": seen}


@case(in_ci=(2,))
def fsdp_state_dicts() -> Any:
    """FSDP1 full, local and sharded state dicts of model and optimizer, loaded again."""
    outcome = []
    for kind, config in (
        (StateDictType.FULL_STATE_DICT, FullStateDictConfig()),
        (StateDictType.LOCAL_STATE_DICT, LocalStateDictConfig()),
        (StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()),
    ):
        module = fsdp()
        seen = losses(module, steps=5)
        other = fsdp()
        for loaded in (module, other):
            FSDP.set_state_dict_type(loaded, kind, config)
        other.load_state_dict(module.state_dict())
        outcome.append([seen, losses(other, steps=5)])
    module = fsdp()
    optimizer = sgd(module)
    seen = losses(module, optimizer, steps=5)
    FSDP.set_state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(),
        FullOptimStateDictConfig(rank0_only=False),
    )
    state = FSDP.optim_state_dict(module, optimizer)
    optimizer.load_state_dict(FSDP.optim_state_dict_to_load(module, optimizer, state))
    moments = [entry["momentum_buffer"] for entry in state["state"].values()]
    return [outcome, seen, losses(module, optimizer, steps=5), moments]


def shard(mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    """FSDP2 of the middle layers, and of the rest."""
    module = seeded(Network)
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(module.middle, mesh=mesh, **options)
    return fully_shard(module, mesh=mesh, **options)


@case()
def fully_sharded() -> Any:
    """FSDP2 on a 1-D mesh."""
    module = shard()
    return result(losses(module), module)


@case(compared=ROUNDING, in_ci=())
def fully_sharded_all_ranks() -> Any:
    """FSDP2, all ranks' gradients in every step."""
    module = shard()
    return result(losses(module, turns=False), module)


@case(world_sizes=(4,))
def fully_sharded_hsdp() -> Any:
    """FSDP2 on a 2 x 2 mesh: sharded and replicated (HSDP)."""
    module = shard(init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return result(losses(module), module)


@case(in_ci=())
def fully_sharded_kept_after_forward() -> Any:
    """FSDP2 with `reshard_after_forward=False`."""
    module = shard(reshard_after_forward=False)
    return result(losses(module), module)


@case(in_ci=(), world_sizes=(4,))
def fully_sharded_smaller_after_forward() -> Any:
    """FSDP2 with `reshard_after_forward=2`."""
    module = shard(reshard_after_forward=2)
    return result(losses(module), module)


@case(in_ci=(2,))
def fully_sharded_mixed_precision() -> Any:
    """FSDP2 with bfloat16 parameters and float32 reductions."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    module = shard(mp_policy=policy)
    return result(losses(module), module)


@case(in_ci=())
def fully_sharded_half_reductions() -> Any:
    """FSDP2 with bfloat16 and with float16 reductions."""
    outcome = []
    for dtype in (BF16, torch.float16):
        module = shard(mp_policy=MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=dtype))
        outcome.append(result(losses(module), module))
    return outcome


@case(compared=ROUNDING)
def fully_sharded_accumulation_and_clipping() -> Any:
    """FSDP2, `set_requires_gradient_sync(False)` in between, `clip_grad_norm_` of DTensors."""
    module, seen = shard(), []
    optimizer = sgd(module)
    for step in range(STEPS):
        for part in range(2):
            module.set_requires_gradient_sync(part == 1)
            loss = loss_of(module, 2 * step + part)
            (loss * share(step)).backward()
            seen.append(loss.item())
        seen.append(nn.utils.clip_grad_norm_(module.parameters(), 1.0).full_tensor().item())
        optimizer.step()
        optimizer.zero_grad()
    return result(seen, module)


@case(in_ci=())
def fully_sharded_divide_factor() -> Any:
    """FSDP2 with `set_gradient_divide_factor` (gloo: half the loss; it has no PREMUL_SUM)."""
    module = shard()
    scale = 0.5
    if dist.get_backend() == "pycomm":
        for unit in (module, module.middle):
            unit.set_gradient_divide_factor(2.0 * dist.get_world_size())
        scale = 1.0

    def loss(module: nn.Module, step: int) -> Tensor:
        return loss_of(module, step) * scale

    seen = [value / scale for value in losses(module, loss=loss)]
    return result(seen, module)


@case(in_ci=())
def fully_sharded_adam() -> Any:
    """FSDP2 with Adam (foreach, and fused)."""
    outcome = []
    for options in ({"foreach": True}, {"fused": True}):
        module = shard()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2, eps=1e-3, **options)
        outcome.append([result(losses(module, optimizer), module), whole(optimizer.state_dict())])
    return outcome
