"""A pipeline trains to the bits of one process that runs the same micro-batches in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from torch import Tensor, nn

from pycomm import DistributedOptimizer, ShardedOptimizer, _core
from pycomm.pipeline import Pipeline
from pycomm.pipeline.micro_batches import cut, sizes

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]
STEPS = 10
SGD_OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


class Block(nn.Module):
    """Uses its input twice and changes the sum in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.narrow(torch.tanh(self.wide(self.norm(x))))).mul_(0.5)


def block_model(layers: int = 8, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks: list[nn.Module] = [Block(6) for _ in range(layers - 2)]
        return nn.Sequential(nn.Linear(5, 6), *blocks, nn.Linear(6, 3)).double()


def batches(rows: int, count: int = STEPS, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, 5, generator=generator, dtype=torch.float64),
            torch.randn(rows, 3, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **SGD_OPTIONS)


def accumulate(
    model: nn.Module, loss_fn: Callable[..., Tensor], x: Any, y: Any, micro_batches: int, rows: int
) -> Tensor:
    """One process's forward and backward of a batch in micro-batches."""
    losses = []
    parts = zip(
        cut(x, micro_batches), cut(y, micro_batches), sizes(rows, micro_batches), strict=True
    )
    for x_part, y_part, its_rows in parts:
        loss = loss_fn(model(x_part), y_part)
        if micro_batches > 1:
            loss = loss * (its_rows / rows)
        loss.backward()
        losses.append(loss.detach())
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


def optimizer_of_replicas(
    pipeline: Pipeline, group: _core.Group, reduced: str
) -> DistributedOptimizer | ShardedOptimizer:
    """Of a pipeline of which each rank of ``group`` has a replica.

    Args:
        reduced: "in shares", "with overlap" or otherwise.
    """
    if reduced == "in shares":
        return ShardedOptimizer(torch.optim.SGD, pipeline.parameters(), group=group, **SGD_OPTIONS)
    return DistributedOptimizer(
        sgd(pipeline.parameters()),
        pipeline.named_parameters(),
        group=group,
        bucket_cap_bytes=400,
        overlap=reduced == "with overlap",
    )


def trained_alone(
    model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], micro_batches: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    optimizer = sgd(model.parameters())
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        losses.append(accumulate(model, nn.functional.mse_loss, x, y, micro_batches, len(x)))
        optimizer.step()
    return dict(model.named_parameters()), losses


def assert_equal_parts(
    parts: Sequence[dict[str, Tensor]], whole: dict[str, Tensor], exactly: bool = True
) -> None:
    """The ranks' parameters are those of one process; together they are all."""
    assert {name for part in parts for name in part} == set(whole)
    for rank, part in enumerate(parts):
        for name, value in part.items():
            if exactly:
                assert torch.equal(value, whole[name]), f"{name} on rank {rank}"
            else:
                torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_parameters_after_ten_steps_are_those_of_one_process(ranks: int, schedule: str) -> None:
    for micro_batches in (1, 2, 3, 4, 7, 8):
        model = block_model()
        data = batches(8)  # not divisible by 3 and 7

        def run(
            group: _core.Group,
            model: nn.Sequential = model,
            data: list[tuple[Tensor, Tensor]] = data,
            micro_batches: int = micro_batches,
        ) -> tuple[dict[str, Tensor], list[Tensor]]:
            pipeline = Pipeline(
                copy.deepcopy(model),
                nn.functional.mse_loss,
                schedule=schedule,
                micro_batches=micro_batches,
                group=group,
            )
            optimizer = sgd(pipeline.parameters())
            losses = []
            for x, y in data:
                optimizer.zero_grad()
                losses.append(pipeline.step(x, y))
                optimizer.step()
            return dict(pipeline.named_parameters()), losses

        results = run_ranks(ranks, run)
        expected, expected_losses = trained_alone(model, data, micro_batches)
        assert_equal_parts([part for part, _ in results], expected)
        for _, losses in results:
            assert all(map(torch.equal, losses, expected_losses))
