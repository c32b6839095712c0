"""A training step of a 10.6 M-parameter transformer: what synchronisation adds to it."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import pycomm
from pycomm.torch_backend.process_group import ProcessGroup
from pycomm.torch_backend.work import DoneWork

from .turns import Request, pin, serve

# DistributedDataParallel on "idle", a process group that does nothing, shows what DDP costs by
# itself: copies into its buckets and back.
VARIANTS = ("alone", "pycomm", "DDP on idle", "DDP on pycomm", "DDP on gloo")
SYNCHRONISED = ("pycomm", "DDP on pycomm", "DDP on gloo")
BATCH, TOKENS, WIDTH, LAYERS = 6, 64, 384, 6


class _Idle(ProcessGroup):
    """Reduces nothing."""

    def allreduce(  # type: ignore[override]  # torch has overloads
        self, tensors: Any, opts: Any = None, *given: Any, **named: Any
    ) -> Any:
        return DoneWork(list(tensors))


def _idle(options: Any, backend_options: object) -> ProcessGroup:
    return _Idle(options.store, options.group_rank, options.group_size, options.timeout)


def transformer() -> nn.Module:
    """The model, equal on every rank."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)


class Replica:
    """One copy of the model and how its gradients are synchronised."""

    def __init__(self, variant: str) -> None:
        encoder = transformer()
        self.parameters = list(encoder.parameters())
        self.model = encoder
        self.optimizer: Any = torch.optim.SGD(encoder.parameters(), lr=1e-4)
        if variant == "pycomm":
            self.optimizer = pycomm.DistributedOptimizer(self.optimizer, encoder.named_parameters())
        elif variant != "alone":
            group = dist.new_group(backend=variant.split()[-1])
            self.model = nn.parallel.DistributedDataParallel(encoder, process_group=group)

    def step(self, batch: torch.Tensor) -> float:
        """Seconds."""
        pycomm.barrier()
        began = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - began

    def checksum(self) -> float:
        """Equal on ranks whose parameters are."""
        total = sum(each.detach().double().abs().sum() for each in self.parameters)
        return float(total)


def main() -> None:
    """Serve at the address in the last argument."""
    torch.set_num_threads(1)
    pycomm.init()
    dist.init_process_group("gloo")
    dist.Backend.register_backend("idle", _idle, extended_api=True, devices=["cpu"])
    rank, size = pycomm.rank(), pycomm.size()
    pin(rank, size)
    replicas = {variant: Replica(variant) for variant in VARIANTS}
    torch.manual_seed(1 + rank)
    batch = torch.randn(BATCH, TOKENS, WIDTH)

    def answer(request: Request) -> Any:
        if request["do"] == "step":
            return replicas[request["variant"]].step(batch)
        return {variant: replica.checksum() for variant, replica in replicas.items()}

    parameters = sum(each.numel() for each in replicas["alone"].parameters)
    hello = {"rank": rank, "parameters": parameters, "version": f"torch {torch.__version__}"}
    serve(sys.argv[-1], hello, answer)
    dist.destroy_process_group()
    pycomm.shutdown()


if __name__ == "__main__":
    main()
