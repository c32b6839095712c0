"""Collectives on the way of one loss that every rank computes.

Between layers a tensor is *whole* (the same on every rank), *split* (a rank has its share of one
dimension), or *partial* (the ranks' tensors add up to the whole). These functions turn one kind
into another, and their gradients the other way round. The gradient of a whole tensor is whole, that
of a split one split; a whole tensor that enters a layer whose parameters are split gets partial
gradients back, which ``copy_to_region`` adds up.

================================  ==================================  ==================
function                          forward                             backward
================================  ==================================  ==================
``copy_to_region``                whole to each rank's use: nothing   all-reduce
``reduce_from_region``            partial to whole: all-reduce        nothing
``scatter_to_region``             whole to split: own share           all-gather
``gather_from_region``            split to whole: all-gather          own share
``gather_from_sequence``          split to each rank's use:           reduce-scatter
                                  all-gather
``reduce_scatter_to_sequence``    partial to split: reduce-scatter    all-gather
================================  ==================================  ==================

Every rank makes the same calls in the same order, forward and backward, on tensors that require a
gradient on all of them or on none. (``pycomm.all_reduce`` and its kin differentiate the sum of all
ranks' losses; where all compute one loss, that counts it once for each rank.) Gradients of
gradients work alike.

Sources: Shoeybi et al., Megatron-LM (2019), its f and g; Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models (2022), for the sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import movable, refuse
from pycomm.collectives import all_gather, all_gather_list, all_reduce, reduce_scatter
from pycomm.collectives.autograd import followed, linear
from pycomm.runtime import group_of
from pycomm.shares import bounds


def copy_to_region(t: Tensor, *, group: Group | None = None) -> Tensor:
    """``t`` itself; the ranks' gradients are added up.

    Args:
        t: the same on every rank.
        group: the ranks that share the layers, the world if None.

    Returns:
        A tensor in the memory of ``t``.
    """
    group = group_of(group)
    if group.size == 1 or not followed(t):
        return t
    return linear(t, Tensor.detach, functools.partial(reduce_from_region, group=group))


def reduce_from_region(t: Tensor, *, group: Group | None = None) -> Tensor:
    """The sum of all ranks' ``t``, on every rank; its gradient goes to each rank as it is.

    Args:
        t: same shape and dtype on every rank.
        group: as for ``copy_to_region``.
    """
    group = group_of(group)
    if group.size == 1:
        return t
    if not followed(t):
        return all_reduce(t, group=group)
    total = functools.partial(all_reduce, group=group)
    return linear(t, total, functools.partial(copy_to_region, group=group))


def scatter_to_region(t: Tensor, dim: int = -1, *, group: Group | None = None) -> Tensor:
    """This rank's share of ``t`` along ``dim``; the gradients of all shares make up that of ``t``.

    Args:
        t: the same on every rank. Shares differ by at most one row, the longer ones first.
        group: as for ``copy_to_region``.
    """
    group = group_of(group)
    dim = _dimension("scatter_to_region", t, dim, group)
    if group.size == 1:
        return t
    length = t.shape[dim]
    begin, end = bounds(length, group.size, group.rank)

    def share(t: Tensor) -> Tensor:
        part = t.narrow(dim, begin, end - begin)
        return part.clone(memory_format=torch.contiguous_format)

    if not followed(t):
        return share(t)
    whole = functools.partial(gather_from_region, dim=dim, length=length, group=group)
    return linear(t, share, whole)


def gather_from_region(
    t: Tensor, dim: int = -1, *, length: int | None = None, group: Group | None = None
) -> Tensor:
    """All ranks' ``t``, end to end along ``dim``; the gradient of ``t`` is this rank's share.

    Args:
        t: a share; same dtype, same lengths of the other dimensions on every rank.
        length: of the whole along ``dim``, cut as ``scatter_to_region`` cuts; if None, all shares
            are as long as this one.
        group: as for ``copy_to_region``.

    Raises:
        InvalidArgumentError: the share is not as long as ``length`` has it.
        MismatchError: without ``length``, shares that differ.
    """
    group = group_of(group)
    dim = _dimension("gather_from_region", t, dim, group)
    if group.size == 1:
        return t
    if length is None:
        length = group.size * t.shape[dim]
    begin, end = bounds(length, group.size, group.rank)
    if end - begin != t.shape[dim]:
        refuse(
            "gather_from_region",
            group,
            f"t has {t.shape[dim]} rows in dimension {dim}, and of {length} this rank's share is "
            f"{end - begin}.\n  Pass as length the rows of all ranks together.",
        )
    whole = functools.partial(_joined, dim=dim, even=length % group.size == 0, group=group)
    if not followed(t):
        return whole(t)
    return linear(t, whole, functools.partial(scatter_to_region, dim=dim, group=group))


def gather_from_sequence(t: Tensor, dim: int = 0, *, group: Group | None = None) -> Tensor:
    """All ranks' ``t``, end to end along ``dim``; its gradient is this rank's share of their sum.

    Args:
        t: a share; the same shape and dtype on every rank.
        group: as for ``copy_to_region``.
    """
    group = group_of(group)
    dim = _dimension("gather_from_sequence", t, dim, group)
    if group.size == 1:
        return t
    whole = functools.partial(_joined, dim=dim, even=True, group=group)
    if not followed(t):
        return whole(t)
    return linear(t, whole, functools.partial(reduce_scatter_to_sequence, dim=dim, group=group))


def reduce_scatter_to_sequence(t: Tensor, dim: int = 0, *, group: Group | None = None) -> Tensor:
    """This rank's share, along ``dim``, of the sum of all ranks' ``t``.

    The gradients of all shares, end to end, are that of ``t`` on each rank.

    Args:
        t: the same shape and dtype on every rank; the number of ranks divides its length in
            ``dim``.
        group: as for ``copy_to_region``.

    Raises:
        InvalidArgumentError: it does not.
    """
    group = group_of(group)
    dim = _dimension("reduce_scatter_to_sequence", t, dim, group)
    if group.size == 1:
        return t
    if t.shape[dim] % group.size:
        more = -t.shape[dim] % group.size
        refuse(
            "reduce_scatter_to_sequence",
            group,
            f"t has {t.shape[dim]} rows in dimension {dim}, which {group.size} ranks do not "
            f"divide.\n  Pad the sequence by {more}.",
        )

    def share(t: Tensor) -> Tensor:
        return reduce_scatter(t.movedim(dim, 0), group=group).movedim(0, dim)

    if not followed(t):
        return share(t)
    return linear(t, share, functools.partial(gather_from_sequence, dim=dim, group=group))


def _joined(t: Tensor, dim: int, even: bool, group: Group) -> Tensor:
    parts: Sequence[Tensor]
    if even:
        stacked = all_gather(t, group=group)
        if dim == 0:
            return stacked.flatten(0, 1)
        parts = stacked.unbind()
    else:
        parts = all_gather_list(t, group=group)
    return torch.cat(list(parts), dim)


def _dimension(call: str, t: Tensor, dim: int, group: Group) -> int:
    """``dim`` counted from the front."""
    movable(call, "t", t, group)
    if not -t.dim() <= dim < t.dim():
        refuse(call, group, f"t has {t.dim()} dimensions, and dim is {dim}.")
    return dim % t.dim()
