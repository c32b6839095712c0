"""pycomm itself, from Python and from C++, and the limit of the machine."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
import torch

import pycomm
from pycomm import _core
from pycomm._core import DType
from pycomm.runtime import world_group

from .collectives import main
from .measure import DTYPE, Array, Bench, Contender, Samples, slots, values

# Up to this size a payload travels in the cache line that announces it.
LINE_BYTES = 48

# Up to this size all that an all-reduce does fits one announcement.
EAGER_BYTES = 4096

CORE = "from C++"
LIMIT = "limit"
ROUND_TRIP = "round trip"
ROUND_TRIPS = 1000


class OwnContender:
    """On a bucket (memory of the group) and on an ordinary tensor."""

    def __init__(self) -> None:
        if not pycomm.is_initialized():
            pycomm.init()
        self.rank = pycomm.rank()
        self.size = pycomm.size()

    def variants(self) -> Sequence[str]:
        # The limit is that of cores which share memory.
        of_one_host = [LIMIT, ROUND_TRIP] if pycomm.host_size() == 1 else []
        return ["bucket", "tensor", CORE, *of_one_host]

    def version(self) -> str:
        staging_mib = world_group().memory_bytes / 2**20
        name = f"pycomm {importlib.metadata.version('pycomm-torch')}"
        return f"{name}, {staging_mib:.1f} MiB of staging a rank and group"

    def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
        if variant == "bucket":
            return [bucket(count) for count in counts]
        return [torch.zeros(count).numpy() for count in counts]

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], Any]:
        input, output = torch.from_numpy(source), torch.from_numpy(target)
        if collective == "all_reduce":
            return partial(pycomm.all_reduce_, output)
        if collective == "broadcast":
            return partial(pycomm.broadcast_, output)
        if collective == "reduce_scatter":
            return partial(pycomm.reduce_scatter_into, output, input)
        if collective == "all_gather":
            return partial(pycomm.all_gather_into, output, input)
        if collective == "all_to_all":
            return partial(pycomm.all_to_all_into, output, input)
        return partial(self._send_recv, output, input)

    def _send_recv(self, output: torch.Tensor, input: torch.Tensor) -> None:
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sent = pycomm.isend(input, after)
        pycomm.recv(output, before)
        sent.wait()

    def barrier(self) -> None:
        pycomm.barrier()


def bucket(count: int) -> Array:
    """Memory of the world's group, which its other ranks read where it lies."""
    memory = world_group().allocate(max(1, count) * DTYPE.itemsize)
    return numpy.frombuffer(memoryview(memory), DTYPE)[:count]


class CoreBench(Bench):
    """All-reduce on buckets, issued in a loop of C++."""

    def __init__(self, contender: Contender, collective: str, nbytes: int) -> None:
        super().__init__(contender, "bucket", collective, nbytes)
        self.addresses = [source.ctypes.data for source in self.sources]

    def run(self) -> float:
        count = self.template.size
        return _core.time_all_reduces(world_group(), self.addresses, count, DType.FLOAT32)


def ranks_per_core(contender: Contender) -> float:
    """A rank times its own work; where ranks outnumber cores, a core does that of several."""
    return max(1.0, contender.size / (os.cpu_count() or 1))


class FoldLimitBench(Bench):
    """What the loads and stores of a large all-reduce take.

    Every rank folds its part of all buckets and writes it to all of them, waiting for nobody.
    Before and after, the caches see what they see with every contender: the inputs are rewritten
    and the results compared.
    """

    def __init__(self, contender: Contender, collective: str, nbytes: int) -> None:
        super().__init__(contender, "bucket", collective, nbytes)
        group = world_group()
        count = self.template.size
        memory = [group.allocate(count * DTYPE.itemsize) for _ in self.sources]
        limits = [_core.MachineLimit(group, each) for each in memory]
        self.sources = self.targets = [numpy.frombuffer(memoryview(each), DTYPE) for each in memory]
        self.calls = [partial(limit.fold_part, count, DType.FLOAT32) for limit in limits]

    def run(self) -> float:
        return ranks_per_core(self.contender) * float(sum(call() for call in self.calls))


class ShowLimitBench:
    """What a small all-reduce takes at least.

    Up to 48 bytes: a cache line there and back, which carries the payload. Up to 4 KiB: the line,
    the copy of the payload to where the others read it and the fold of all copies.
    """

    def __init__(self, contender: Contender, nbytes: int) -> None:
        self.contender = contender
        self.nbytes = nbytes
        self.count = nbytes // DTYPE.itemsize
        self.template = values(self.count, contender.rank)
        group = world_group()
        memory = [group.allocate(self.count * DTYPE.itemsize) for _ in range(slots(nbytes))]
        self.limits = [_core.MachineLimit(group, each) for each in memory]
        self.sources = [numpy.frombuffer(memoryview(each), DTYPE)[: self.count] for each in memory]

    def samples(self, repeat: int) -> list[float]:
        return [self._sample() for _ in range(repeat)]

    def _sample(self) -> float:
        for source in self.sources:
            numpy.copyto(source, self.template)
        self.contender.barrier()
        seconds = 0.0
        if self.nbytes > LINE_BYTES:
            seconds += sum(each.show(self.count, DType.FLOAT32) for each in self.limits)
            self.contender.barrier()
            seconds += sum(each.fold_shown(self.count, DType.FLOAT32) for each in self.limits)
            self.contender.barrier()
        work_s = ranks_per_core(self.contender) * seconds / len(self.limits)
        round_trip_s = self.limits[0].round_trip(ROUND_TRIPS)
        self.contender.barrier()
        return work_s + round_trip_s


class RoundTripBench:
    """A cache line there and back."""

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        group = world_group()
        self.limit = _core.MachineLimit(group, group.allocate(4096))

    def samples(self, repeat: int) -> list[float]:
        return [self._sample() for _ in range(repeat)]

    def _sample(self) -> float:
        self.contender.barrier()
        seconds = self.limit.round_trip(ROUND_TRIPS)
        self.contender.barrier()
        return seconds


def make_bench(contender: Contender, variant: str, collective: str, nbytes: int) -> Samples:
    """The measurement of a variant."""
    if variant == ROUND_TRIP:
        return RoundTripBench(contender)
    if variant == LIMIT:
        if nbytes > EAGER_BYTES:
            return FoldLimitBench(contender, collective, nbytes)
        return ShowLimitBench(contender, nbytes)
    if variant == CORE:
        return CoreBench(contender, collective, nbytes)
    return Bench(contender, variant, collective, nbytes)


if __name__ == "__main__":
    main(OwnContender(), make_bench)
