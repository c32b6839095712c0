"""The measurement itself, the same for every contender.

One sample: every rank writes its inputs anew (untimed: as backward would; otherwise each core would
find its part of the last result in its own cache), all ranks meet, and each takes the time of its
calls, one for each of several equal buffers, one after the other. With several buffers a small
operation is timed without a clock or a barrier of its own; together they are at most 256 KiB, so
that large ones are timed one by one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy

DTYPE = numpy.dtype(numpy.float32)
SLOT_BYTES_TOGETHER = 256 << 10
MOST_SLOTS = 64

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "send_recv")

# The variant whose all_reduce has an output beside its input.
TWO_BUFFERS = "two buffers"

Array = Any  # numpy.ndarray, whose type parameters differ between versions


class Contender(Protocol):
    """A library under test, in one rank."""

    rank: int
    size: int

    def variants(self) -> Sequence[str]:
        """Ways to run it, measured one by one."""

    def version(self) -> str:
        """What the report calls it."""

    def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
        """An array of each number of elements, in the memory that the variant is about."""

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], Any]:
        """The collective on these arrays, which are one if it works in place."""

    def barrier(self) -> None: ...


def slots(nbytes: int) -> int:
    """How many buffers one sample goes over."""
    return max(1, min(MOST_SLOTS, SLOT_BYTES_TOGETHER // nbytes))


def in_place(collective: str, variant: str) -> bool:
    """Whether the result overwrites the input."""
    return collective == "broadcast" or (collective == "all_reduce" and variant != TWO_BUFFERS)


def shapes(collective: str, nbytes: int, size: int) -> tuple[int, int]:
    """Elements of input and output. ``nbytes`` is the larger of the two; blocks are whole."""
    count = max(1, nbytes // DTYPE.itemsize)
    block = max(1, count // size)
    if collective == "reduce_scatter":
        return block * size, block
    if collective == "all_gather":
        return block, block * size
    if collective == "all_to_all":
        return block * size, block * size
    return count, count


def values(count: int, rank: int) -> Array:
    """A rank's input: small whole numbers, so that every sum is exact in any order."""
    return (numpy.arange(count) % 7 + 3 * rank + 1).astype(DTYPE)


def expected(collective: str, count: int, rank: int, size: int) -> Array:
    """What ``rank`` ends with, for inputs of ``count`` elements."""
    if collective == "broadcast":
        return values(count, 0)
    if collective == "send_recv":
        return values(count, (rank - 1) % size)
    if collective == "all_gather":
        return numpy.concatenate([values(count, other) for other in range(size)])
    block = count // size
    mine = slice(rank * block, (rank + 1) * block)
    if collective == "all_to_all":
        return numpy.concatenate([values(count, other)[mine] for other in range(size)])
    total = sum(values(count, other) for other in range(size))
    return total[mine] if collective == "reduce_scatter" else total


class Samples(Protocol):
    """Something that can be measured again and again."""

    def samples(self, repeat: int) -> list[float]:
        """Seconds of one operation on this rank, ``repeat`` times."""


class Bench:
    """One contender's variant on one collective and size, ready to be sampled."""

    def __init__(self, contender: Contender, variant: str, collective: str, nbytes: int) -> None:
        self.contender = contender
        count, result_count = shapes(collective, nbytes, contender.size)
        self.template = values(count, contender.rank)
        self.expected = expected(collective, count, contender.rank, contender.size)
        many = slots(nbytes)
        self.sources = contender.arrays(variant, [count] * many)
        self.targets = (
            self.sources
            if in_place(collective, variant)
            else contender.arrays(variant, [result_count] * many)
        )
        self.calls = [
            contender.call(variant, collective, source, target)
            for source, target in zip(self.sources, self.targets, strict=True)
        ]
        self.clock_s = _clock_seconds()

    def samples(self, repeat: int) -> list[float]:
        """Seconds of one operation, this rank's mean over the slots, ``repeat`` times.

        Raises:
            ValueError: a result is wrong.
        """
        return [self._sample() for _ in range(repeat)]

    def run(self) -> float:
        """Seconds of one call for each slot."""
        began = time.perf_counter()
        for call in self.calls:
            call()
        return time.perf_counter() - began - self.clock_s

    def _sample(self) -> float:
        for source, target in zip(self.sources, self.targets, strict=True):
            numpy.copyto(source, self.template)
            if target is not source:
                target.fill(-1)  # or what an earlier sample left would pass for the result
        self.contender.barrier()
        seconds = self.run()
        self.contender.barrier()
        for target in self.targets:
            if not numpy.array_equal(target, self.expected):
                wrong = int(numpy.flatnonzero(target != self.expected)[0])
                raise ValueError(
                    f"rank {self.contender.rank}: element {wrong} of {self.expected.size} is "
                    f"{target[wrong]} instead of {self.expected[wrong]}"
                )
        return max(seconds, 0.0) / len(self.calls)


def _clock_seconds() -> float:
    """What reading the clock adds to a measured time."""
    readings = [time.perf_counter() for _ in range(1000)]
    return min(after - before for before, after in itertools.pairwise(readings))
