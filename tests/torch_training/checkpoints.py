"""torch.distributed.checkpoint."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from torch_training.cases import Network, case, losses, seeded, sgd, whole
from torch_training.sharded import shard


@contextmanager
def folder() -> Iterator[Path]:
    """One for all ranks, gone afterwards."""
    name = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(name)
    try:
        yield Path(str(name[0]))
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(str(name[0]))


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model, optim = get_state_dict(module, optimizer)
    return {"model": model, "optim": optim}


def continued(module: nn.Module, path: Path) -> list[float]:
    """Load into a fresh model and its optimizer, and go on training."""
    optimizer = sgd(module)
    state = state_of(module, optimizer)
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    return losses(module, optimizer, steps=5)


@case()
def checkpoint_of_fully_sharded() -> Any:
    """`dcp.save` and `dcp.load` of FSDP2 with its optimizer; DDP loads what FSDP2 saved."""
    with folder() as path:
        module = shard()
        optimizer = sgd(module)
        seen = losses(module, optimizer, steps=5)
        dcp.save(state_of(module, optimizer), checkpoint_id=path)
        seen += continued(shard(), path)
        return [seen, continued(DDP(seeded(Network)), path)]


@case(in_ci=())
def checkpoint_of_ddp() -> Any:
    """`dcp.save` of DDP, and `dcp.load` into DDP and into FSDP2."""
    with folder() as path:
        module = DDP(seeded(Network))
        optimizer = sgd(module)
        seen = losses(module, optimizer, steps=5)
        dcp.save(state_of(module, optimizer), checkpoint_id=path)
        return [seen, continued(DDP(seeded(Network)), path), continued(shard(), path)]


def saved_meanwhile(kind: AsyncCheckpointerType) -> Any:
    with folder() as path:
        module = shard()
        optimizer = sgd(module)
        seen = losses(module, optimizer, steps=5)
        future = dcp.async_save(
            state_of(module, optimizer),
            checkpoint_id=path,
            process_group=dist.new_group(),  # the training goes on in the other
            async_checkpointer_type=kind,
        )
        seen += losses(module, optimizer, steps=5)  # while it is written
        future.result()
        return [seen, continued(shard(), path)]


@case(in_ci=(2,))
def checkpoint_async_thread() -> Any:
    """`dcp.async_save` in a thread, training meanwhile."""
    return saved_meanwhile(AsyncCheckpointerType.THREAD)


@case(in_ci=())
def checkpoint_async_process() -> Any:
    """`dcp.async_save` in a process, training meanwhile."""
    return saved_meanwhile(AsyncCheckpointerType.PROCESS)


@case(world_sizes=(4,))
def checkpoint_on_fewer_ranks() -> Any:
    """Saved by FSDP2 on 4 ranks, loaded on 2 of them; saved there, loaded on 4."""
    half = dist.new_group([0, 1])
    with folder() as path:
        module = shard()
        seen = losses(module, steps=5)
        dcp.save(get_model_state_dict(module), checkpoint_id=path / "four")
        two: list[Any] = []
        if dist.get_rank() < 2:
            other = fully_shard(seeded(Network), mesh=DeviceMesh.from_group(half, "cpu"))
            state = get_model_state_dict(other)
            dcp.load(state, checkpoint_id=path / "four", process_group=half)
            two = [whole(state)]
            dcp.save(state, checkpoint_id=path / "two", process_group=half)
        dist.barrier()
        state = get_model_state_dict(shard())
        dcp.load(state, checkpoint_id=path / "two")
        return [seen, two, whole(state), whole(get_model_state_dict(module))]


@case(in_ci=())
def checkpoint_full_state_dict() -> Any:
    """`get_state_dict` with `full_state_dict`, and `set_state_dict` broadcast from rank 0."""
    options = StateDictOptions(full_state_dict=True)
    module = shard()
    optimizer = sgd(module)
    seen = losses(module, optimizer, steps=5)
    model, optim = get_state_dict(module, optimizer, options=options)
    other = shard()
    other_optimizer = sgd(other)
    if dist.get_rank() > 0:
        for t in model.values():
            t.zero_()
    set_state_dict(
        other,
        other_optimizer,
        model_state_dict=model,
        optim_state_dict=optim,
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    return [seen, losses(other, other_optimizer, steps=5)]
