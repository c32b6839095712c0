"""Small models for faults in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pycomm
from faults.fault import RANKS


def weights() -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(torch.zeros(1000)) for i in range(4)}


def optimizer_of(params: dict[str, nn.Parameter], **options: Any) -> pycomm.DistributedOptimizer:
    bare = torch.optim.SGD(params.values(), lr=0.1)
    return pycomm.DistributedOptimizer(bare, params.items(), **options)


def pipeline_with(module: nn.Module) -> tuple[pycomm.pipeline.Pipeline, Tensor]:
    """A stage on each rank, of which this rank's ends with ``module``; and a batch."""
    stages = [nn.Sequential(nn.Linear(8, 8), module) for _ in range(RANKS)]
    made = pycomm.pipeline.Pipeline(stages, nn.functional.mse_loss, micro_batches=4)
    return made, torch.ones(8, 8)
