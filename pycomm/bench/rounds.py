"""Interleaved rounds: every contender has a turn in each, so that noise disturbs all alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pycomm.bench.ranks import own
from pycomm.errors import CommError

# What only an all-reduce has.
_ALL_REDUCE_ONLY = {own.CORE, own.LIMIT, own.ROUND_TRIP}


class Turns(Protocol):
    """The ranks of one contender."""

    label: str
    variants: Sequence[str]
    version: str

    def turn(self, *, variant: str, collective: str, nbytes: int, repeat: int) -> list[list[float]]:
        """Each rank's samples."""


@dataclass(frozen=True)
class Entry:
    """One thing that is measured: a contender's variant."""

    turns: Turns
    variant: str


@dataclass
class Measured:
    """Seconds of one operation, the slowest rank's, by size and (contender, variant)."""

    samples: dict[int, dict[tuple[str, str], list[float]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, nbytes: int, label: str, variant: str) -> float | None:
        found = self.samples.get(nbytes, {}).get((label, variant))
        return statistics.median(found) if found else None

    def best(self, nbytes: int, label: str) -> float | None:
        """The faster of a contender's variants."""
        medians = [
            statistics.median(values)
            for (name, _), values in self.samples.get(nbytes, {}).items()
            if name == label and values
        ]
        return min(medians, default=None)


def measure(
    entries: Sequence[Entry],
    collective: str,
    sizes: Sequence[int],
    rounds: int,
    *,
    announce: Callable[[int], None] = lambda nbytes: None,
) -> Measured:
    """Measure all entries at all sizes. One that fails is left out from there on."""
    measured = Measured()
    for nbytes in sizes:
        announce(nbytes)
        table = measured.samples.setdefault(nbytes, {})
        for number in range(rounds + 1):  # the first touches memory and is not counted
            turn = number % max(1, len(entries))
            for entry in [*entries[turn:], *entries[:turn]]:
                if entry.turns.label in measured.failures:
                    continue
                if not _is_asked(entry.variant, collective, nbytes):
                    continue
                try:
                    by_rank = entry.turns.turn(
                        variant=entry.variant,
                        collective=collective,
                        nbytes=nbytes,
                        repeat=_repeat(nbytes) if number else 1,
                    )
                except CommError as error:
                    measured.failures[entry.turns.label] = str(error)
                    continue
                if number:
                    samples = table.setdefault((entry.turns.label, entry.variant), [])
                    samples += [max(of_ranks) for of_ranks in zip(*by_rank, strict=True)]
    return measured


def _is_asked(variant: str, collective: str, nbytes: int) -> bool:
    if variant in _ALL_REDUCE_ONLY and collective != "all_reduce":
        return False
    return variant != own.ROUND_TRIP or nbytes <= own.EAGER_BYTES


def _repeat(nbytes: int) -> int:
    """Samples of one turn: many of what is short."""
    return 10 if nbytes <= 1 << 20 else 3 if nbytes <= 8 << 20 else 1
