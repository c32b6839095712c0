"""Which fault a round has. Pure: a round follows from the seed and its number alone."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass

KINDS = ("kill", "stop", "raise", "differ", "leave")
HOST_KINDS = ("cut", "power off", "kill")  # of rounds on two hosts
PHASES = ("start-up", "training", "pipeline", "checkpoint", "shutdown")
RANKS = 4

# How long after the beginning of the phase on the victim: about as long as a phase takes.
_LONGEST_DELAY_S = {"start-up": 1.5, "shutdown": 0.02}
_USUAL_DELAY_S = 0.6


@dataclass(frozen=True)
class Fault:
    """What happens to whom, and when."""

    kind: str
    rank: int
    phase: str
    delay_s: float  # from the beginning of the phase
    hosts: int = 1  # on which the ranks are

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Fault:
        return Fault(**json.loads(text))

    def __str__(self) -> str:
        where = " (2 hosts)" if self.hosts > 1 else ""
        return f"{self.kind} rank {self.rank} in {self.phase}+{self.delay_s:.3f}s{where}"


def fault_of(seed: int, number: int, kinds: tuple[str, ...] = KINDS, hosts: int = 1) -> Fault:
    """The fault of round ``number``: kinds and phases in turn, all else at random."""
    generator = random.Random(f"{seed}/{number}")
    kind = kinds[number % len(kinds)]
    phase = PHASES[number // len(kinds) % len(PHASES)]
    if kind in ("differ", "leave") and phase in ("start-up", "shutdown"):
        phase = "training"  # there is no call that could be another
    delay_s = generator.uniform(0, _LONGEST_DELAY_S.get(phase, _USUAL_DELAY_S))
    return Fault(kind, generator.randrange(RANKS), phase, delay_s, hosts)
