"""What synchronisation adds to a training step: pycomm, DistributedDataParallel, none."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pycomm.bench.ranks.step import SYNCHRONISED, VARIANTS
from pycomm.bench.team import Team
from pycomm.errors import CommError

WARM_UP = 3


@dataclass(frozen=True)
class StepCost:
    """Seconds, the slower rank's.

    Attributes:
        step_s: median of a variant's steps.
        cost_s: median over rounds of what a step took more than the unsynchronised one next to it.
        spread_s: half the distance of that difference's quartiles.
    """

    step_s: float
    cost_s: float
    spread_s: float


def measure_step(
    team: Team, rounds: int, *, announce: Callable[[int], None] = lambda number: None
) -> dict[str, StepCost]:
    """Each round makes one step of each variant, in rotated order.

    Raises:
        CommError: a rank failed, or ranks that were synchronised have different parameters.
    """
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(rounds + WARM_UP):
        announce(number)
        turn = number % len(VARIANTS)
        for variant in (*VARIANTS[turn:], *VARIANTS[:turn]):
            taken = max(team.turn(do="step", variant=variant))
            if number >= WARM_UP:
                seconds[variant].append(taken)
    checksums = team.turn(do="checksum")
    for variant in SYNCHRONISED:
        if len({of_rank[variant] for of_rank in checksums}) > 1:
            raise CommError(f"bench step: ranks that {variant} synchronised have other parameters.")
    return {variant: _cost(seconds[variant], seconds["alone"]) for variant in VARIANTS}


def _cost(mine: list[float], alone: list[float]) -> StepCost:
    differences = [a - b for a, b in zip(mine, alone, strict=True)]
    low, _, high = statistics.quantiles(differences, n=4)
    return StepCost(
        step_s=statistics.median(mine),
        cost_s=statistics.median(differences),
        spread_s=(high - low) / 2,
    )
