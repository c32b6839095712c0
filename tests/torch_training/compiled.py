"""What torch.compile makes of programs that communicate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from torch_training.cases import Network, batch, case, losses, result, seeded, share
from torch_training.sharded import shard

BACKEND = "aot_eager"


@case(world_sizes=(2,))
def compiled_collectives() -> Any:
    """Functional collectives and `dist.all_reduce` under `torch.compile(fullgraph=True)`."""
    size = dist.get_world_size()

    @torch.compile(backend=BACKEND, fullgraph=True)
    def program(x: Tensor) -> list[Tensor]:
        x = x * 2
        total = functional.all_reduce(x, "sum", dist.group.WORLD)
        gathered = functional.all_gather_tensor(total + x, 0, dist.group.WORLD)
        kept = functional.reduce_scatter_tensor(gathered, "sum", 0, dist.group.WORLD)
        moved = functional.all_to_all_single(kept, None, None, dist.group.WORLD)
        written = moved.clone()
        dist.all_reduce(written)
        return [total + 1, gathered, kept, moved, written]

    torch._dynamo.reset()
    return program(batch(1)[0][:4].repeat(size, 1) * share(0))


@case(world_sizes=(2,))
def compiled_ddp() -> Any:
    """DDP under `torch.compile`."""
    torch._dynamo.reset()
    module = DDP(seeded(Network))
    compiled = torch.compile(module, backend=BACKEND)
    seen = losses(compiled)
    return result(seen, module)


@case(world_sizes=(2,), in_ci=())
def compiled_fully_sharded() -> Any:
    """FSDP2 under `torch.compile`."""
    torch._dynamo.reset()
    module = shard()
    module.compile(backend=BACKEND)
    return result(losses(module), module)
