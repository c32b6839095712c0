"""The norm of gradients that are spread over ranks, and clipping by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pycomm._core import Group
from pycomm.collectives import all_gather_list
from pycomm.errors import InvalidArgumentError
from pycomm.runtime import group_of
from pycomm.shares import is_share, named_shares, split_group


@dataclasses.dataclass(frozen=True)
class Spread:
    """Ranks that have the parts of a model."""

    group: Group
    counts: Callable[[Tensor], bool] = lambda param: True
    """Whether a parameter is to be counted on this rank, and not on another that has it too."""


class SpreadModel(Protocol):
    """A model in parts, such as a ``Pipeline``."""

    def spreads(self) -> list[Spread]:
        """Over which ranks, one axis after the other."""
        ...


def spreads_of(model: nn.Module | SpreadModel) -> list[Spread]:
    """Over which ranks the parameters of a model are spread.

    Raises:
        InvalidArgumentError: a module with layers split over different groups.
    """
    if not isinstance(model, nn.Module):
        return model.spreads()
    group = split_group(model)
    if group is None:
        return []
    split = {id(param) for _, param, _ in named_shares(model)}
    is_first = group.rank == 0
    return [Spread(group, lambda param: is_first or id(param) in split)]


def clip_grad_norm_(
    parameters: nn.Module | Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    group: Group | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` where each rank has other parameters.

    For models in parts: hand-made stages, or a module with layers of ``tensor_parallel``, whose
    whole parameters count once. (``Pipeline.clip_grad_norm_`` is for pipelines.) Not for data
    parallelism, where all ranks have all gradients.

    Args:
        parameters: this rank's, or the module that has them; their gradients are multiplied in
            place.
        group: the ranks whose parameters make up the model; all call it. If None, those that share
            the module's split layers, or else the world.

    Returns:
        The norm of all gradients as one vector, float64, the same bits on every rank.

    Raises:
        InvalidArgumentError: a negative ``max_norm``, or, if asked for, a norm that is no number;
            parameters of split layers without their module; a group that has ranks with the same
            parts, such as replicas; on every rank.

    Cost: one all-gather of a number for each parameter; on a GPU the host waits for it once.
    """
    spreads: list[Spread] = []
    own: list[Tensor] = []
    if isinstance(parameters, nn.Module):
        spreads = spreads_of(parameters)
        own += parameters.parameters()
    else:
        own += [parameters] if isinstance(parameters, Tensor) else parameters
        if any(map(is_share, own)):
            raise InvalidArgumentError(
                "clip_grad_norm_: some of the parameters are shares of split layers; what else the "
                "ranks of such a layer have is the same on all, and counts once.\n"
                "  Pass the module instead of its parameters."
            )
    if group is not None or not spreads:
        group = group_of(group)
        spreads += _other_spread(group, spreads)
    total = total_norm(with_gradients(own), norm_type, spreads)
    return scale_to_norm(own, total, max_norm, error_if_nonfinite, spreads[-1].group)


def _other_spread(group: Group, spreads: Sequence[Spread]) -> list[Spread]:
    """``group`` as one more axis, unless it is one of those there are."""
    for spread in spreads:
        both = set(spread.group.ranks) & set(group.ranks)
        if both == set(spread.group.ranks) == set(group.ranks):
            return []
        if len(both) > 1:
            raise InvalidArgumentError(
                f"clip_grad_norm_ on rank {group.rank}: the layers are split over ranks "
                f"{sorted(spread.group.ranks)}, and group is ranks {sorted(group.ranks)}: what "
                "they have would be counted more than once.\n"
                "  Leave group out, or pass the ranks that have other layers."
            )
    return [Spread(group)]


def with_gradients(parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have a gradient, with it."""
    return [(param, param.grad) for param in parameters if param.grad is not None]


def total_norm(
    gradients: Iterable[tuple[Tensor, Tensor]], norm_type: float, spreads: Sequence[Spread]
) -> Tensor:
    """The norm of all ranks' gradients.

    Collective over each of the spreads' groups, one after the other. The bits are the same on every
    rank: all put together the same numbers in the same order.

    Args:
        gradients: of this rank, each with its parameter.
    """
    norms = [
        torch.linalg.vector_norm(gradient, norm_type, dtype=_wide(gradient)).double()
        for param, gradient in gradients
        if all(spread.counts(param) for spread in spreads)
    ]
    known = _on_host(norms)
    for spread in spreads:
        known = torch.cat(all_gather_list(known, group=spread.group))
    if not len(known):
        return torch.zeros((), dtype=torch.float64)
    norm: Tensor = torch.linalg.vector_norm(known, norm_type)
    return norm


def _wide(gradient: Tensor) -> torch.dtype:
    """In which a norm has room: that of 16-bit floats may be larger than they can be."""
    return torch.promote_types(gradient.dtype, torch.float32)


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
