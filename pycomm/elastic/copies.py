"""The two last copies a rank has taken, and which of them survivors go back to. No I/O.

A commit is: every rank takes a copy; all meet; every rank confirms it. A rank may be lost between
any two of these, so some survivors may have confirmed a commit that others have not, and some may
have taken a copy that others have not. But nobody confirms a copy before everybody has taken it.
So a rank that keeps the last confirmed copy beside the one it is taking always has one in common
with every other survivor; tests/test_elastic_copies.py tries all interleavings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mark:
    """Which commit a copy is of: the same on two ranks exactly for the same state."""

    number: int
    """Of commits, from the beginning of the training."""
    world: str
    """The name of the world that made it. After a loss other ranks make a commit of the same
    number again, from other batches."""


@dataclass(frozen=True)
class Copy:
    """The state as it was at a commit."""

    mark: Mark
    ranks: int
    """How many there were."""
    values: dict[str, Any]


class Copies:
    """This rank's."""

    def __init__(self) -> None:
        self._confirmed: Copy | None = None
        self._other: Copy | None = None  # being taken, or the one before

    def marks(self) -> list[Mark]:
        """Of all that are held."""
        return [copy.mark for copy in (self._confirmed, self._other) if copy is not None]

    def spare(self) -> Copy | None:
        """The one that ``take`` drops: its memory may be written over."""
        return self._other

    def take(self, copy: Copy) -> None:
        """Hold it beside the last confirmed one."""
        self._other = copy

    def confirm(self) -> None:
        """All ranks have taken what this one has."""
        assert self._other is not None
        self._confirmed, self._other = self._other, self._confirmed

    def held(self, mark: Mark) -> Copy | None:
        """The copy of that commit, if it is held."""
        for copy in (self._confirmed, self._other):
            if copy is not None and copy.mark == mark:
                return copy
        return None

    def settle(self, copy: Copy) -> None:
        """All go back to this one; whatever else is held is of no use to anybody."""
        self._confirmed, self._other = copy, None


def latest_in_common(everyones: Sequence[Sequence[Mark]]) -> Mark | None:
    """The latest commit of which everybody who holds any copy holds one; None if nobody does.

    Who holds none has only just come, and is given one.
    """
    holders = [set(marks) for marks in everyones if marks]
    if not holders:
        return None
    common = set.intersection(*holders)
    assert common, f"no copy in common: {everyones}"
    return max(common, key=lambda mark: mark.number)
