"""An MPI, through mpi4py on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy
from mpi4py import MPI

from .collectives import main
from .measure import DTYPE, TWO_BUFFERS, Array


class MpiContender:
    """All-reduce in place and into another array: the faster of the two counts."""

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self.comm = MPI.COMM_WORLD if comm is None else comm
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()

    def variants(self) -> Sequence[str]:
        return ["in-place", TWO_BUFFERS]

    def version(self) -> str:
        vendor, numbers = MPI.get_vendor()
        return f"{vendor} {'.'.join(map(str, numbers))}"

    def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
        return [numpy.zeros(count, DTYPE) for count in counts]

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], Any]:
        comm = self.comm
        if collective == "all_reduce":
            return partial(comm.Allreduce, MPI.IN_PLACE if target is source else source, target)
        if collective == "broadcast":
            return partial(comm.Bcast, source, 0)
        if collective == "reduce_scatter":
            return partial(comm.Reduce_scatter_block, source, target)
        if collective == "all_gather":
            return partial(comm.Allgather, source, target)
        if collective == "all_to_all":
            return partial(comm.Alltoall, source, target)
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        return partial(comm.Sendrecv, source, after, 0, target, before, 0)

    def barrier(self) -> None:
        self.comm.Barrier()


if __name__ == "__main__":
    main(MpiContender())
