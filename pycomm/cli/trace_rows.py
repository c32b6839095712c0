"""The calls of all ranks beside each other. Pure functions of what their recorders hold."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pycomm import _core
from pycomm._core import OperationState

_FIRST = 1  # the number of a rank's first record


class RankView:
    """What one rank's recorder holds, at a moment of its host's clock."""

    def __init__(self, trace: _core.RankTrace, now_s: float) -> None:
        self.rank, self.size, self.host = trace.rank, trace.size, trace.host
        self.process, self.host_name, self.job = trace.process, trace.host_name, trace.job
        self.gone, self.left = trace.gone, trace.left
        self.to_time_of_day_s = trace.to_time_of_day_s
        self.records = trace.records
        self._now_s = now_s
        self._latest: dict[int, int] = {}  # by group; 0: only messages are kept
        for record in self.records:
            latest = self._latest.get(record.group, 0)
            self._latest[record.group] = max(latest, record.sequence)
        forgot = bool(self.records) and self.records[0].number > _FIRST
        self._knows_since_s = self.began_s(self.records[0]) if forgot else -math.inf

    def may_miss(self, row: Row) -> bool:
        """Whether the rank has not come to this call; an earlier one may be forgotten.

        Where all of the group's may be: if others began it since what is the oldest here.
        """
        if latest := self._latest.get(row.group, 0):
            return row.sequence > latest
        return row.began_s >= self._knows_since_s

    def is_in(self, row: Row) -> bool:
        """Whether the rank is known to be in the group: it has called something, or is named."""
        if row.group in self._latest or not row.group_name.startswith("ranks "):
            return True
        return str(self.rank) in row.group_name.removeprefix("ranks ").split(", ")

    def began_s(self, record: _core.Record) -> float:
        """When a call began: time of day."""
        return (record.started_s or record.queued_s) + self.to_time_of_day_s

    def progress(self, record: _core.Record) -> str:
        """What has become of a call."""
        began_s = record.started_s or record.queued_s
        if record.state is OperationState.DONE:
            return f"{(record.ended_s - began_s) * 1e3:.1f} ms"
        if record.state is OperationState.FAILED:
            return f"failed after {record.ended_s - began_s:.1f} s"
        waits = "in it for" if record.state is OperationState.RUNNING else "queued"
        return f"{waits} {self._now_s - began_s:.1f} s"


@dataclass
class Row:
    """One position in a group's order of calls."""

    group: int
    group_name: str
    sequence: int
    records: dict[int, _core.Record] = field(default_factory=dict)  # by rank
    began_s: float = 0.0  # time of day, on the rank that was first

    @property
    def key(self) -> tuple[int, int]:
        return self.group, self.sequence

    @property
    def usual(self) -> _core.Record:
        """What most ranks did there; of two equal halves, the lower rank's."""
        counts = collections.Counter(record.call for record in self.records.values())
        return max(self.records.values(), key=lambda record: counts[record.call])

    def agrees(self, record: _core.Record) -> bool:
        """Whether it is the usual call, as far as is known."""
        usual = self.usual
        if record.hash and usual.hash:
            return record.hash == usual.hash
        return record.call == usual.call  # one of them had just begun it

    def __str__(self) -> str:
        return f"{self.group_name} #{self.sequence} {self.usual.call}{self.usual.site}"


@dataclass(frozen=True)
class Divergence:
    """The first call that not all ranks of a group have made."""

    row: Row
    text: str

    def __str__(self) -> str:
        return self.text


def rows(ranks: Sequence[RankView]) -> list[Row]:
    """All collectives, in the order in which the first rank began each."""
    found: dict[tuple[int, int], Row] = {}
    for view in ranks:
        for record in view.records:
            if record.is_message or not record.sequence:
                continue
            began_s = view.began_s(record)
            key = record.group, record.sequence
            row = found.setdefault(key, Row(record.group, record.group_name, record.sequence))
            row.began_s = min(row.began_s, began_s) if row.records else began_s
            row.records[view.rank] = record
    return sorted(found.values(), key=lambda row: (row.began_s, row.sequence))


def first_divergence(ranks: Sequence[RankView], aligned: Sequence[Row]) -> Divergence | None:
    """Where ranks made different calls or, failing that, to which call some have not come."""
    for row in aligned:
        others = [rank for rank, record in row.records.items() if not row.agrees(record)]
        if others:
            return Divergence(row, _difference(row, others))
    for row in aligned:
        late = [view for view in ranks if view.is_in(row) and view.may_miss(row)]
        if late:
            return Divergence(row, _absence(row, late))
    return None


def _difference(row: Row, others: list[int]) -> str:
    theirs = "; ".join(
        f"rank {rank} made {row.records[rank].call}{row.records[rank].site}" for rank in others
    )
    usual = [rank for rank, record in row.records.items() if row.agrees(record)]
    return (
        f"First divergence, at call #{row.sequence} of {row.group_name}: "
        f"rank {', '.join(map(str, usual))} made {row.usual.call}{row.usual.site}; {theirs}."
    )


def _absence(row: Row, late: list[RankView]) -> str:
    whom = ", ".join(
        f"{view.rank} ({'gone' if view.gone else 'has left' if view.left else 'alive'})"
        for view in late
    )
    return (
        f"First divergence: rank {whom} has not come to call #{row.sequence} of {row.group_name}: "
        f"{row.usual.call}{row.usual.site}."
    )
