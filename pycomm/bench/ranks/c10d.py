"""torch.distributed, on gloo or on pycomm: by itself, the latter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .collectives import main
from .measure import DTYPE, Array


class C10dContender:
    """A process group of the backend, of all ranks; torch's variables say where they meet."""

    def __init__(self, label: str, backend: str) -> None:
        self._label = label
        self._backend = backend
        self._group = None  # the default one
        if dist.is_initialized():
            self._group = dist.new_group(backend=backend)
        else:
            dist.init_process_group(backend)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def variants(self) -> Sequence[str]:
        return [self._label]

    def version(self) -> str:
        return f"{self._backend} through torch {torch.__version__}"

    def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
        return [torch.zeros(count).numpy().astype(DTYPE, copy=False) for count in counts]

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], Any]:
        input, output, group = torch.from_numpy(source), torch.from_numpy(target), self._group
        if collective == "all_reduce":
            return partial(dist.all_reduce, output, group=group)
        if collective == "broadcast":
            return partial(dist.broadcast, output, 0, group=group)
        if collective == "reduce_scatter":
            return partial(dist.reduce_scatter_tensor, output, input, group=group)
        if collective == "all_gather":
            return partial(dist.all_gather_into_tensor, output, input, group=group)
        if collective == "all_to_all":
            return partial(dist.all_to_all_single, output, input, group=group)
        return partial(self._send_recv, output, input)

    def _send_recv(self, output: torch.Tensor, input: torch.Tensor) -> None:
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sent = dist.isend(input, after, group=self._group)
        dist.recv(output, before, group=self._group)
        if sent is not None:
            sent.wait()

    def barrier(self) -> None:
        dist.barrier(group=self._group)


if __name__ == "__main__":
    main(C10dContender("c10d", "pycomm"))
