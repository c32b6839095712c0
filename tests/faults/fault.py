"""What a fault is: what a rank does for it, and what the ranks are to see."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RANKS = 4
ROLES = ("victim", "near", "far")
ENDED = "ended"  # a rank that has no time to raise anything: the launcher or the core ends it


@dataclass
class Part:
    """One rank's part in a fault; what it raises is noted for it.

    Attributes:
        write: notes an event of this rank.
        timeout_s: the deadline of the job's calls.
        again: another call of what the error was about, to see whether that is usable.
        afterwards: done once the error is noted.
    """

    rank: int
    is_victim: bool
    write: Callable[[str], None]
    timeout_s: float
    again: Callable[[], object] | None
    afterwards: list[Callable[[], object]] = field(default_factory=list)

    def begins(self) -> None:
        """The fault happens now."""
        self.write("began")

    def calls(self) -> None:
        """This rank has computed up to now: what it hears of the fault counts from here."""
        self.write("calls")

    def is_ready(self) -> None:
        """Somebody outside may make the fault now."""
        self.write("ready")


@dataclass(frozen=True)
class Fault:
    """A row of the table.

    Attributes:
        do: what each rank does; the victim breaks something.
        what, others: as the table says what happens, and where the other ranks are.
        victim, near, far: the class that a rank in this role is to raise, or ENDED; "" for nothing.
            Near are the ranks of the victim's host, and all others if there is only one host.
        usable: whether what was called can be called again.
        lost: a process is lost, and with it the group of all ranks.
        ends_job: survivors cannot go on without it either.
        early: ``do`` comes before ``init()``.
        outside: what is done to the second host, by a name of ``Cluster``'s.
        ulfm: whether mpirun leaves survivors alone, and MPI looks for dead processes.
        says: matches what ended ranks leave in the output; its first group is the rank.
    """

    name: str
    do: Callable[[Part], Any]
    what: str
    others: str
    victim: str
    near: str
    far: str
    hosts: int
    usable: bool
    lost: bool
    ends_job: bool
    early: bool
    outside: str
    ulfm: bool
    says: str

    @property
    def victim_rank(self) -> int | None:
        return None if self.outside else RANKS - 1

    def role(self, rank: int) -> str:
        if rank == self.victim_rank:
            return "victim"
        return "near" if self.hosts == 1 or rank >= RANKS // 2 else "far"

    def expected(self, rank: int) -> str:
        return str(getattr(self, self.role(rank)))


FAULTS: dict[str, Fault] = {}


def fault(
    what: str,
    *,
    others: str = "in a collective",
    all: str = "",
    victim: str | None = None,
    near: str | None = None,
    far: str | None = None,
    hosts: tuple[int, ...] = (1,),
    usable: bool = False,
    lost: bool = False,
    ends_job: bool = False,
    early: bool = False,
    outside: str = "",
    ulfm: bool = True,
    says: str = "",
) -> Callable[[Callable[[Part], Any]], Callable[[Part], Any]]:
    """Enter a fault into the table, or one for each number of hosts.

    Args:
        all: what every rank sees whose role is not named.
        near: what all but the victim see, if ``far`` is not named.
    """

    def enter(do: Callable[[Part], Any]) -> Callable[[Part], Any]:
        near_ = all if near is None else near
        for count in hosts:
            name = do.__name__ if count == 1 else f"{do.__name__}_on_{count}_hosts"
            FAULTS[name] = Fault(
                name=name,
                do=do,
                what=what,
                others=others,
                victim=all if victim is None else victim,
                near=near_,
                far=near_ if far is None else far,
                hosts=count,
                usable=usable,
                lost=lost,
                ends_job=ends_job,
                early=early,
                outside=outside,
                ulfm=ulfm,
                says=says,
            )
        return do

    return enter


def compute(seconds: float) -> None:
    """Without a call of pycomm."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(1000))
