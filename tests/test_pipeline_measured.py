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


class Sleeping(nn.Module):
    """Takes ``seconds`` for each third of its work, so that the cores are not the limit."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        of_input: Tensor = _Sleep.apply(x, self.seconds)  # type: ignore[no-untyped-call]
        of_weight: Tensor = _Sleep.apply(self.weight, self.seconds)  # type: ignore[no-untyped-call]
        return of_input * of_weight


class _Sleep(torch.autograd.Function):
    """Its gradient takes a while."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


RANKS, MICRO_BATCHES = 3, 5


def measured_bubble(schedule: str, third_s: float) -> float:
    """The least of three steps whose stages take ``third_s`` for each third of their work."""
    of_each = usual_stages_per_rank(schedule)

    def run(group: _core.Group) -> float:
        model = nn.Sequential(*(Sleeping(third_s) for _ in range(RANKS * of_each)))
        pipeline = Pipeline(
            model,
            nn.functional.mse_loss,
            schedule=schedule,
            micro_batches=MICRO_BATCHES,
            group=group,
        )
        x = torch.ones(MICRO_BATCHES, 1, requires_grad=True)
        seconds = []
        for _ in range(3):  # a busy machine may hold one of them up
            pipeline.step(x, torch.ones(MICRO_BATCHES, 1))
            seconds.append(pipeline.statistics.seconds)
        return min(seconds)

    return 1 - MICRO_BATCHES * of_each * 3 * third_s / max(run_ranks(RANKS, run))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bubble_is_what_the_schedule_predicts(schedule: str) -> None:
    """Within 5 % of the step, with stages of equal cost.

    What a busy machine adds to each third is a matter of milliseconds: it counts for less the
    longer the thirds are. What the schedule wastes counts for as much.
    """
    planned = make(schedule, RANKS, MICRO_BATCHES, usual_stages_per_rank(schedule))
    expected = pytest.approx(simulate(planned, Costs()).bubble, abs=0.05)
    for third_s in (0.06, 0.24):
        if (bubble := measured_bubble(schedule, third_s)) == expected:
            break
    assert bubble == expected


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
