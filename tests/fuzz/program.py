"""A random program: what all ranks do, in one order, as data that a seed makes again.

Groups have numbers, 0 the world. All ranks know the whole program, so each can compute what every
other brings. Operations on a group are issued in one order by its members, and waited for in any: a
program cannot deadlock unless pycomm does.
"""

from __future__ import annotations

import dataclasses
import random

# The host of each rank.
LAYOUTS = (
    [0, 0],
    [0, 1],
    [0, 0, 0],
    [0, 1, 0],
    [0, 1, 2],
    [0, 0, 0, 0],
    [0, 0, 1, 1],
    [0, 1, 0, 1],
    [0, 0, 0, 1],
    [0, 0, 0, 0, 0],
    [0, 1, 1, 0, 2],
)
PIECE_BYTES = (1024, 4096, 64 << 10)  # of staging
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "all_reduce_grouped")
MOVES = (
    "broadcast",
    "all_gather",
    "all_to_all",
    "all_to_all_splits",
    "gather",
    "scatter",
    "gather_list",
    "all_gather_list",
)
MESSAGES = ("message", "ring", "any_source", "swap")
OTHERS = ("barrier", "all_gather_object", "broadcast_object")
KINDS = (*REDUCTIONS * 3, *MOVES, *MESSAGES * 2, *OTHERS)
PLACES = ("heap", "odd", "arena", "odd arena")  # odd: three bytes behind a boundary
MOST_GROUPS = 6


@dataclasses.dataclass(frozen=True)
class Operation:
    """One call, or messages that belong together, of all members of a group."""

    kind: str
    group: int
    seed: int  # of dtype, values, and whatever the kind alone needs
    count: int
    columns: int
    root: int  # below the group's size
    places: tuple[str, ...]  # of rank r: places[r % len(places)]
    in_place: bool
    wait_after: int | None  # the step behind which all wait; None: a blocking call

    def random(self, *more: int) -> random.Random:
        return random.Random(repr((self.seed, *more)))


@dataclasses.dataclass(frozen=True)
class MakeGroup:
    """Groups from one that there is; each gets the next number."""

    how: str  # duplicate, new_group or split
    parent: int
    members: tuple[tuple[int, ...], ...]  # of each new group: ranks in the parent, in its order


@dataclasses.dataclass(frozen=True)
class DropGroup:
    group: int


@dataclasses.dataclass(frozen=True)
class Threads:
    """Each list on a group of its own, all at once, a thread each; blocking calls."""

    lists: tuple[tuple[Operation, ...], ...]


Step = Operation | MakeGroup | DropGroup | Threads


@dataclasses.dataclass(frozen=True)
class Program:
    seed: int
    hosts: tuple[int, ...]
    piece_bytes: int
    steps: tuple[Step, ...]

    @property
    def operations(self) -> int:
        return sum(
            sum(map(len, step.lists)) if isinstance(step, Threads) else isinstance(step, Operation)
            for step in self.steps
        )

    def prefix(self, steps: int) -> Program:
        """Its first steps; what would be waited for later is waited for at their end."""
        kept = [
            dataclasses.replace(step, wait_after=min(step.wait_after, steps - 1))
            if isinstance(step, Operation) and step.wait_after is not None
            else step
            for step in self.steps[:steps]
        ]
        return dataclasses.replace(self, steps=tuple(kept))


def generate(seed: int, steps: int, hosts: tuple[int, ...] | None = None) -> Program:
    """The program of a seed: the same one for the same arguments, everywhere.

    Args:
        hosts: the host of each rank; drawn if None.
    """
    draw = random.Random(seed)
    layout = tuple(draw.choice(LAYOUTS))
    piece_bytes = draw.choice(PIECE_BYTES)
    return _Generator(draw, seed, hosts or layout, piece_bytes, steps).program()


class _Generator:
    def __init__(
        self, draw: random.Random, seed: int, hosts: tuple[int, ...], piece_bytes: int, steps: int
    ) -> None:
        self._draw = draw
        self._seed = seed
        self._hosts = hosts
        self._piece_bytes = piece_bytes
        self._count = steps
        self._members = {0: tuple(range(len(hosts)))}  # world ranks of each group there is
        self._next_group = 1

    def program(self) -> Program:
        steps = tuple(self._step(number) for number in range(self._count))
        return Program(self._seed, self._hosts, self._piece_bytes, steps)

    def _step(self, number: int) -> Step:
        draw = self._draw
        what = draw.random()
        if what < 0.04 and len(self._members) < MOST_GROUPS:
            return self._make_group()
        if what < 0.06 and len(self._members) > 1:
            dropped = draw.choice([group for group in self._members if group])
            del self._members[dropped]
            return DropGroup(dropped)
        if what < 0.09 and len(self._members) > 2:
            groups = draw.sample(list(self._members), draw.randint(2, min(3, len(self._members))))
            return Threads(
                tuple(
                    tuple(self._operation(group, None) for _ in range(draw.randint(1, 5)))
                    for group in groups
                )
            )
        wait_after = None
        if draw.random() < 0.4:
            wait_after = min(self._count - 1, number + draw.choice([0, 1, 2, 5, 12]))
        return self._operation(draw.choice(list(self._members)), wait_after)

    def _make_group(self) -> MakeGroup:
        draw = self._draw
        parent = draw.choice(list(self._members))
        ranks = list(range(len(self._members[parent])))
        how = draw.choice(["duplicate", "new_group", "split"])
        if how == "duplicate":
            members = [ranks]
        elif how == "new_group":
            members = [draw.sample(ranks, draw.randint(1, len(ranks)))]
        else:
            draw.shuffle(ranks)
            colors = draw.randint(1, 3)
            members = [ranks[color::colors] for color in range(colors) if ranks[color::colors]]
            if len(members) > 1 and draw.random() < 0.2:
                members.pop()  # ranks without a color
        for group in members:
            world = self._members[parent]
            self._members[self._next_group] = tuple(world[rank] for rank in group)
            self._next_group += 1
        return MakeGroup(how, parent, tuple(map(tuple, members)))

    def _operation(self, group: int, wait_after: int | None) -> Operation:
        draw = self._draw
        p = len(self._members[group])
        piece = self._piece_bytes
        count = draw.choice([0, 1, p - 1, p, p + 1, 37, 300, 1000, piece // 4, piece // 2 + 5])
        if draw.random() < 0.03:
            count = 5 * piece // 4
        return Operation(
            kind=draw.choice(KINDS),
            group=group,
            seed=draw.getrandbits(32),
            count=min(count, 20000),
            columns=draw.choice([1, 1, 1, 3]),
            root=draw.randrange(p),
            places=tuple(draw.choice(PLACES) for _ in range(draw.randint(1, 3))),
            in_place=draw.random() < 0.5,
            wait_after=wait_after,
        )
