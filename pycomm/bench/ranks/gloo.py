"""gloo, through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from .collectives import main
from .measure import DTYPE, Array


class GlooContender:
    """The default process group, which is made from torchrun's variables if it is not there."""

    def __init__(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def variants(self) -> Sequence[str]:
        return ["gloo"]

    def version(self) -> str:
        return f"gloo of torch {torch.__version__}"

    def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
        return [torch.zeros(count).numpy().astype(DTYPE, copy=False) for count in counts]

    def call(
        self, variant: str, collective: str, source: Array, target: Array
    ) -> Callable[[], Any]:
        input, output = torch.from_numpy(source), torch.from_numpy(target)
        if collective == "all_reduce":
            return partial(dist.all_reduce, output)
        if collective == "broadcast":
            return partial(dist.broadcast, output, 0)
        if collective == "reduce_scatter":
            return partial(dist.reduce_scatter_tensor, output, input)
        if collective == "all_gather":
            return partial(dist.all_gather_into_tensor, output, input)
        if collective == "all_to_all":
            return partial(dist.all_to_all_single, output, input)
        return partial(self._send_recv, output, input)

    def _send_recv(self, output: torch.Tensor, input: torch.Tensor) -> None:
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sent = dist.isend(input, after)
        dist.recv(output, before)
        if sent is not None:
            sent.wait()

    def barrier(self) -> None:
        dist.barrier()


if __name__ == "__main__":
    main(GlooContender())
