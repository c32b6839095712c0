"""Loss scaling where each rank sees other gradients: all of them step, or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycomm._core import Group, ReduceOp
from pycomm.collectives import all_reduce_
from pycomm.runtime import group_of


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that skips a step on every rank if any has found an inf or NaN.

    For pipelines and split layers, whose ranks have other parameters each, and for
    ``ShardedOptimizer``, which reduces gradients in its step. Where all ranks have the whole model,
    the gradients of a ``DistributedOptimizer`` are the same on all, and torch's own will do.

    ::

        scaler = pycomm.GradScaler(group=mesh["pp"])
        loss = pipeline.step(batch, target, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()

    Args:
        device, init_scale, ...: as for ``torch.amp.GradScaler``.
        group: the ranks that step together, the world if None, which is always right. All make the
            same calls.
    """

    def __init__(self, device: str = "cuda", *, group: Group | None = None, **options: Any) -> None:
        super().__init__(device, **options)
        self._group = group_of(group, "GradScaler")

    def _unscale_grads_(self, *arguments: Any, **options: Any) -> dict[torch.device, Tensor]:
        found_inf = super()._unscale_grads_(*arguments, **options)
        if not found_inf and self._scale is not None:
            # No gradients here: nothing to object to a step of the others.
            device = self._scale.device
            found_inf[device] = torch.zeros((), dtype=torch.float32, device=device)
        for tensor in found_inf.values():
            all_reduce_(tensor, ReduceOp.MAX, group=self._group)
        return found_inf
