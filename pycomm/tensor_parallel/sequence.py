"""Layers between the split ones, each rank on its part of the sequence.

What lies between a ``RowParallelLinear`` and the next ``ColumnParallelLinear`` (norms, dropout,
residual sums) computes the same on every rank. With ``sequence_dim`` given to the layers on both
sides, each rank computes it for its part of the sequence alone, and keeps a p-th of the
activations; the all-reduces of a pair become as many bytes of reduce-scatter and all-gather.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycomm._core import Group
from pycomm.arguments import refuse
from pycomm.errors import InvalidArgumentError
from pycomm.runtime import group_of
from pycomm.shares import HeldGroup
from pycomm.tensor_parallel.regions import copy_to_region


class SequenceLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` of a rank's part of the sequence; its gradients are summed over the ranks.

    Args:
        group: the ranks that have the other parts, the world if None. Others as ``nn.LayerNorm``.

    Cost: backward one all-reduce of the parameters' gradients.
    """

    def __init__(self, *arguments: Any, group: Group | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._held = HeldGroup(group_of(group, "SequenceLayerNorm"))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: shape ``(*, *normalized_shape)``, split along the sequence; so is the result."""
        weight, bias = _used_on_parts([self.weight, self.bias], self._held.group)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class SequenceRMSNorm(nn.RMSNorm):
    """``nn.RMSNorm`` of a rank's part of the sequence; its gradient is summed over the ranks.

    Args:
        group: the ranks that have the other parts, the world if None. Others as ``nn.RMSNorm``.

    Cost: backward one all-reduce of the parameter's gradient.
    """

    def __init__(self, *arguments: Any, group: Group | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._held = HeldGroup(group_of(group, "SequenceRMSNorm"))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: shape ``(*, *normalized_shape)``, split along the sequence; so is the result."""
        (weight,) = _used_on_parts([self.weight], self._held.group)
        return functional.rms_norm(x, self.normalized_shape, weight, self.eps)


class SplitDropout(nn.Module):
    """Dropout of a tensor that is split: each rank's share of the mask that one process would draw.

    So the ranks' random states stay equal, which an ordinary dropout of whole tensors needs, and
    training drops what it drops on one rank. It is drawn whole, and only the share is kept.

    Args:
        p: the probability of an element to be zeroed.
        dim: along which the input is split: a sequence, or the heads of attention's weights. The
            ranks' shares are equally long.
        group: the ranks that have the other shares, the world if None.
    """

    def __init__(self, p: float = 0.5, *, dim: int, group: Group | None = None) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise InvalidArgumentError(f"SplitDropout: p is {p!r}. Pass a probability.")
        self.p, self.dim = p, dim
        self._held = HeldGroup(group_of(group, "SplitDropout"))

    def forward(self, x: Tensor) -> Tensor:
        """``x``: a share; the result is as it."""
        if not self.training or self.p == 0.0:
            return x
        group = self._held.group
        if not -x.dim() <= self.dim < x.dim():
            refuse("SplitDropout", group, f"x has {x.dim()} dimensions, and dim is {self.dim}.")
        shape = list(x.shape)
        length = shape[self.dim]
        shape[self.dim] = group.size * length
        mask = functional.dropout(x.new_ones(shape), self.p)
        return x * mask.narrow(self.dim, group.rank * length, length)

    def extra_repr(self) -> str:
        """As ``nn.Dropout``."""
        return f"p={self.p}, dim={self.dim}"


def _used_on_parts(params: list[Tensor | None], group: Group) -> list[Tensor | None]:
    """The parameters, whose gradients of all ranks are summed, in one all-reduce."""
    present = [param for param in params if param is not None]
    if not present or group.size == 1:
        return params
    ends = list(itertools.accumulate(param.numel() for param in present))[:-1]
    flat = copy_to_region(torch.cat([param.flatten() for param in present]), group=group)
    parts = iter(torch.tensor_split(flat, ends))
    return [None if param is None else next(parts).view(param.shape) for param in params]
