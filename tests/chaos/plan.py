"""Which fault a round has. Pure: a round follows from the seed and its number alone."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace

# What a rank does to itself, what happens to a whole host, and what elastic training loses: ranks,
# or a host in one of these ways.
RANK_KINDS = ("kill", "stop", "raise", "differ", "leave")
HOST_KINDS = ("cut", "power off")
ELASTIC_KINDS = ("recover", *(f"recover after {kind}" for kind in HOST_KINDS))
KINDS = (*RANK_KINDS, *HOST_KINDS, *ELASTIC_KINDS)

PHASES = ("start-up", "training", "pipeline", "checkpoint", "shutdown")
ELASTIC_PHASE = "elastic"

RANKS = 4
RANKS_OF_A_HOST = 2  # where there are two

# How long after the beginning of the phase on the victim: about as long as a phase takes.
_LONGEST_DELAY_S = {"start-up": 1.5, "shutdown": 0.02, "elastic": 2.0}
_USUAL_DELAY_S = 0.6


@dataclass(frozen=True)
class Fault:
    """What happens to whom, and when."""

    kind: str
    rank: int  # of a host's fault: its host is the one
    phase: str
    delay_s: float  # from the beginning of the phase
    hosts: int = 1  # on which the ranks are
    twice: bool = False  # a second rank is lost a little later

    @property
    def is_elastic(self) -> bool:
        return self.kind in ELASTIC_KINDS

    @property
    def of_host(self) -> str | None:
        """What happens to a host, if that is the fault."""
        return next((kind for kind in HOST_KINDS if self.kind.endswith(kind)), None)

    @property
    def host(self) -> int:
        return self.rank // RANKS_OF_A_HOST if self.hosts > 1 else 0

    @property
    def victims(self) -> tuple[int, ...]:
        """Ranks that come to harm, the first one first."""
        if self.of_host:
            first = self.host * RANKS_OF_A_HOST
            return tuple(range(first, first + RANKS_OF_A_HOST))
        return (self.rank, (self.rank + 2) % RANKS) if self.twice else (self.rank,)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> Fault:
        return Fault(**json.loads(text))

    def __str__(self) -> str:
        whom = f"host {self.host}" if self.of_host else f"rank {self.rank}"
        also = " and another" if self.twice else ""
        where = " (2 hosts)" if self.hosts > 1 else ""
        return f"{self.kind} {whom}{also} in {self.phase}+{self.delay_s:.3f}s{where}"


def fault_of(seed: int, number: int) -> Fault:
    """The fault of round ``number``: kinds and phases in turn, all else at random."""
    generator = random.Random(f"{seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    phase = PHASES[number // len(KINDS) % len(PHASES)]
    if kind in ELASTIC_KINDS:
        phase = ELASTIC_PHASE
    if kind in ("differ", "leave") and phase in ("start-up", "shutdown"):
        phase = "training"  # there is no call that could be another
    fault = Fault(
        kind,
        rank=generator.randrange(RANKS),
        phase=phase,
        delay_s=generator.uniform(0, _LONGEST_DELAY_S.get(phase, _USUAL_DELAY_S)),
        twice=kind == "recover" and generator.random() < 1 / 2,
    )
    several = fault.of_host or (kind in ("kill", "stop") and generator.random() < 1 / 3)
    return replace(fault, hosts=2) if several else fault
