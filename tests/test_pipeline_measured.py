"""What a schedule predicts is what happens: the bubble, and how many activations are kept."""

from __future__ import annotations

import time
import weakref
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from test_pipeline import SCHEDULES
from torch import Tensor, nn

from pycomm import _core
from pycomm.pipeline import Pipeline
from pycomm.pipeline.schedule import Costs, make, simulate, usual_stages_per_rank

FORWARD_S = 0.06
COSTS = Costs(FORWARD_S, FORWARD_S, FORWARD_S)


class Sleeping(nn.Module):
    """Takes as long for each third of its work, so that the cores are not the limit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        result: Tensor = _Sleep.apply(x) * _Sleep.apply(self.weight)  # type: ignore[no-untyped-call]
        return result


class _Sleep(torch.autograd.Function):
    """Its gradient takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(FORWARD_S)
        return gradient


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_what_the_schedule_predicts(schedule: str) -> None:
    """Within 5 % of the step, with stages of equal cost: 3 ranks, 5 micro-batches."""
    ranks, micro_batches = 3, 5
    of_each = usual_stages_per_rank(schedule)
    expected = simulate(make(schedule, ranks, micro_batches, of_each), COSTS)

    def run(group: _core.Group) -> float:
        model = nn.Sequential(*(Sleeping() for _ in range(ranks * of_each)))
        pipeline = Pipeline(
            model, nn.functional.mse_loss, schedule=schedule, micro_batches=5, group=group
        )
        x = torch.ones(micro_batches, 1, requires_grad=True)
        seconds = []
        for _ in range(3):  # a busy machine may hold one of them up
            pipeline.step(x, torch.ones(micro_batches, 1))
            seconds.append(pipeline.statistics.seconds)
        return min(seconds)

    busy = micro_batches * of_each * 3 * FORWARD_S
    bubble = 1 - busy / max(run_ranks(ranks, run))
    assert bubble == pytest.approx(expected.bubble, abs=0.05)


class Watched(nn.Module):
    """Counts the inputs that are alive: those that backward still needs, and slots in use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 300)
        self.alive: set[int] = set()
        self.most = 0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        number = self.calls
        self.alive.add(number)
        weakref.finalize(x.untyped_storage(), self.alive.discard, number)
        self.most = max(self.most, len(self.alive))
        y: Tensor = self.linear(x)
        return y


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
def test_the_activations_kept_are_what_the_schedule_says(schedule: str) -> None:
    """1F1B keeps at most as many micro-batches as there are stages, however many there are."""
    ranks, micro_batches = 4, 12
    planned = make(schedule, ranks, micro_batches)
    expected = simulate(planned).most_held

    def run(group: _core.Group) -> tuple[int, int]:
        stages = [Watched() for _ in range(ranks)]
        pipeline = Pipeline(
            stages, nn.functional.mse_loss, schedule=schedule, micro_batches=12, group=group
        )
        x = torch.randn(micro_batches, 300)
        for _ in range(3):
            pipeline.step(x, x)
        return pipeline.statistics.most_held, stages[group.rank].most

    results = run_ranks(ranks, run)
    assert tuple(held for held, _ in results) == expected
    if schedule == "1f1b":
        assert max(expected) <= ranks
    # The first stage's inputs are views of the batch, which lives anyway.
    assert [alive for _, alive in results[1:]] == list(expected[1:])
