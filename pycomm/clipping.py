"""The norm of gradients that are spread over ranks, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.collectives import all_gather_list
from pycomm.errors import InvalidArgumentError
from pycomm.runtime import group_of


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    group: Group | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where each rank has other parameters.

    For the stages of a pipeline (see ``Pipeline.clip_grad_norm_``, which counts shared parameters
    once) and for other models in parts; not for data parallelism, where all ranks have the whole.

    Args:
        parameters: this rank's; their gradients are multiplied in place.
        group: the ranks whose parameters make up the model, the world if None; all call it.

    Returns:
        The norm of all gradients as one vector, float64, the same bits on every rank.

    Raises:
        InvalidArgumentError: a negative ``max_norm``, or, if asked for, a norm that is no number;
            on every rank.

    Cost: one all-gather of a number for each parameter; on a GPU the host waits for it once.
    """
    group = group_of(group)
    own = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    total = total_norm(own, norm_type, group)
    return scale_to_norm(own, total, max_norm, error_if_nonfinite, group)


def total_norm(parameters: Iterable[Tensor], norm_type: float, group: Group) -> Tensor:
    """Of the gradients of all ranks' parameters; collective. Those without one are left out."""
    norms = [
        torch.linalg.vector_norm(param.grad, norm_type).double()
        for param in parameters
        if param.grad is not None
    ]
    mine = _on_host(norms)
    everyones = torch.cat(all_gather_list(mine, group=group))
    if not len(everyones):
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(everyones, norm_type)
    return norm


def scale_to_norm(
    parameters: Iterable[Tensor],
    total: Tensor,
    max_norm: float,
    error_if_nonfinite: bool,
    group: Group,
) -> Tensor:
    """Multiply the gradients so that their norm is at most ``max_norm``; returns ``total``."""
    if max_norm < 0:
        raise InvalidArgumentError(
            f"clip_grad_norm_ on rank {group.rank}: max_norm is {max_norm!r}. Pass 0 or more."
        )
    if error_if_nonfinite and not math.isfinite(total):
        raise InvalidArgumentError(
            f"clip_grad_norm_ on rank {group.rank}: the norm of the gradients is {float(total)}, "
            "and they cannot be clipped by it.\n"
            "  Look for the first loss that is no number, or pass error_if_nonfinite=False."
        )
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for param in parameters:
        if param.grad is not None:
            # It stays on the host: a kernel takes it as an argument, and nobody waits for a copy.
            param.grad.mul_(factor.to(param.grad.dtype))
    return total


def _on_host(numbers: list[Tensor]) -> Tensor:
    """As one vector, in their order; the host waits once for each device they are on."""
    places: dict[torch.device, list[int]] = {}
    for index, number in enumerate(numbers):
        places.setdefault(number.device, []).append(index)
    result = torch.empty(len(numbers), dtype=torch.float64)
    for indices in places.values():
        result[indices] = torch.stack([numbers[index] for index in indices]).cpu()
    return result
