"""What the ranks saw of a fault against what they were to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from faults.fault import ENDED, RANKS, Fault
from faults.runner import Seen


@dataclass
class Row:
    """A fault, made in several rounds.

    Attributes:
        seconds: from the fault (or a rank's next call, if it computed) to the error, of each rank
            but the victim.
        texts: by role, what the first such rank was told first.
        usable, over: whether the next call, and starting over, worked; of each rank that tried.
        problems: what is not as it is to be.
    """

    fault: Fault
    rounds: int = 0
    seconds: list[float] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    usable: list[bool] = field(default_factory=list)
    over: list[bool] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, seen: Seen) -> None:
        """Another round."""
        self.rounds += 1
        before = len(self.problems)
        if seen.hung:
            self.problems.append("the job hung")
        began = [note["t"] for notes in seen.notes for note in notes if note["event"] == "began"]
        if not began:
            self.problems.append("it did not come to the fault")
        for rank in range(RANKS):
            self._add_rank(rank, seen, min(began, default=0.0))
        if len(self.problems) > before:
            self.problems.append(f"the end of its output:\n{seen.output[-3000:]}")

    def _add_rank(self, rank: int, seen: Seen, began: float) -> None:
        fault, role = self.fault, self.fault.role(rank)
        expected = fault.expected(rank)
        saw = seen.find(rank, "saw")
        if saw is not None and (saw["type"] or expected):
            if saw["type"] != expected:
                found = f"{saw['type'] or 'nothing'}: {saw['text']}"
                self.problems.append(f"rank {rank} saw {found}, not {expected or 'nothing'}")
            self._add_error(role, saw["text"], max(began, _called(rank, seen)), saw["t"])
            if saw["usable"] not in (None, fault.usable):
                self.problems.append(f"rank {rank}: group_usable is {saw['usable']}")
        elif saw is None and expected == ENDED:
            end = seen.find(rank, "said") or seen.find(rank, "job ended")
            if end is None:
                self.problems.append(f"rank {rank} was not ended")
            else:
                self._add_error(role, end.get("text", ""), began, end["t"])
        elif saw is None and expected:
            self.problems.append(f"rank {rank} was silent")
        again = seen.find(rank, "again")
        if again is not None and not fault.lost:
            self.usable.append(again["works"])
            if again["works"] != fault.usable:
                self.problems.append(f"rank {rank}: the next call: {again['text'] or 'works'}")
        over = seen.find(rank, "over")
        if not fault.lost:
            self.over.append(over is not None and over["works"])
            if over is None or not over["works"]:
                why = "did not happen" if over is None else over["text"]
                self.problems.append(f"rank {rank}: starting over: {why}")

    def _add_error(self, role: str, text: str, began: float, at: float) -> None:
        if text:
            self.texts.setdefault(role, text.splitlines()[0])
        if role != "victim":
            self.seconds.append(at - began)


def _called(rank: int, seen: Seen) -> float:
    called = seen.find(rank, "calls")
    return 0.0 if called is None else float(called["t"])


def problems(rows: Sequence[Row]) -> list[str]:
    return [f"{row.fault.name}: {problem}" for row in rows for problem in row.problems]
