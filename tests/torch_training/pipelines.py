"""torch.distributed.pipelining: its schedules, and a pipeline of replicas."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from torch_training.cases import STEPS, batch, case, seeded, sgd

ROWS = 16
WIDTH = 8


def stage_module(index: int) -> nn.Module:
    def make() -> nn.Module:
        layers = [
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH)) for _ in range(8)
        ]
        return layers[index]

    return seeded(make)


def run_pipeline(
    schedule_class: Any, stages_per_rank: int, microbatches: int, *, v_shaped: bool = False
) -> Any:
    """Losses on the rank of the last stage, and this rank's parameters."""
    size, rank = dist.get_world_size(), dist.get_rank()
    count = size * stages_per_rank
    mine = [rank + size * i for i in range(stages_per_rank)]
    if v_shaped:
        mine = [rank, count - 1 - rank]
    modules = [stage_module(index) for index in mine]
    stages = [
        PipelineStage(module, index, count, torch.device("cpu"))
        for module, index in zip(modules, mine, strict=True)
    ]
    return train(stages, schedule_class, stages_per_rank, microbatches, rank, count, modules)


def train(
    stages: list[PipelineStage],
    schedule_class: Any,
    stages_per_rank: int,
    microbatches: int,
    data_seed: int,
    count: int,
    modules: list[nn.Module],
    replica: int = 0,
) -> Any:
    schedule = schedule_class(
        stages if stages_per_rank > 1 else stages[0], microbatches, loss_fn=nn.functional.mse_loss
    )
    optimizer = sgd(nn.ModuleList(modules))
    is_first = any(stage.is_first for stage in stages)
    is_last = any(stage.is_last for stage in stages)
    seen: list[Tensor] = []
    for step in range(STEPS):
        x, _ = batch(step, rank=replica, rows=ROWS)
        target = x.roll(1, 1).tanh()
        of_microbatches: list[Tensor] = []
        given = (x,) if is_first else ()
        if is_last:
            schedule.step(*given, target=target, losses=of_microbatches)
        else:
            schedule.step(*given)
        seen += [loss.detach() for loss in of_microbatches]
        optimizer.step()
        optimizer.zero_grad()
    assert len(seen) == (STEPS * microbatches if is_last else 0)
    return [seen, [p.detach() for module in modules for p in module.parameters()]]


@case()
def pipeline_gpipe() -> Any:
    """ScheduleGPipe."""
    return run_pipeline(ScheduleGPipe, 1, 4)


@case()
def pipeline_1f1b() -> Any:
    """Schedule1F1B."""
    return run_pipeline(Schedule1F1B, 1, 8)


@case()
def pipeline_interleaved_1f1b() -> Any:
    """ScheduleInterleaved1F1B, two stages a rank."""
    return run_pipeline(ScheduleInterleaved1F1B, 2, 8)


@case(in_ci=())
def pipeline_looped_bfs() -> Any:
    """ScheduleLoopedBFS, two stages a rank."""
    return run_pipeline(ScheduleLoopedBFS, 2, 4)


@case(in_ci=())
def pipeline_interleaved_zero_bubble() -> Any:
    """ScheduleInterleavedZeroBubble, two stages a rank."""
    return run_pipeline(ScheduleInterleavedZeroBubble, 2, 8)


@case(in_ci=(2,))
def pipeline_zero_bubble() -> Any:
    """ScheduleZBVZeroBubble, two stages a rank."""
    return run_pipeline(ScheduleZBVZeroBubble, 2, 8, v_shaped=True)


@case(in_ci=())
def pipeline_dual_pipe() -> Any:
    """ScheduleDualPipeV, two stages a rank."""
    return run_pipeline(ScheduleDualPipeV, 2, 8, v_shaped=True)


@case(world_sizes=(4,))
def pipeline_of_replicas() -> Any:
    """Schedule1F1B on one dimension of a 2 x 2 mesh, DDP on the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    index, replica = mesh.get_local_rank("pp"), mesh.get_local_rank("dp")
    module = DDP(stage_module(index), process_group=mesh.get_group("dp"))
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    return train([stage], Schedule1F1B, 1, 4, 0, 2, [module], replica)
