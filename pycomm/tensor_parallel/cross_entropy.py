"""Cross entropy of logits whose vocabulary is split, which are never put together."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pycomm._core import Group, ReduceOp
from pycomm.arguments import REDUCIBLE, refuse
from pycomm.collectives import all_reduce_
from pycomm.device import place_of
from pycomm.runtime import group_of
from pycomm.shares import bounds
from pycomm.tensor_parallel.agreement import check_same


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocabulary: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
    group: Group | None = None,
) -> Tensor:
    """``functional.cross_entropy`` over logits of which each rank has a share of the vocabulary.

    Args:
        logits: shape ``(*, V_r)``, classes last: what a ``ColumnParallelLinear`` over the
            vocabulary returns. Floating; 16-bit floats are computed in float32.
        target: class numbers of the whole vocabulary, shape ``(*)``; the same on every rank.
        vocabulary: of all ranks together, cut as ``ColumnParallelLinear`` cuts; if None, all shares
            are as long as this one.
        ignore_index, label_smoothing, reduction: as for ``functional.cross_entropy``.
        group: the ranks that have the shares, the world if None.

    Returns:
        The loss, the same bits on every rank; shape ``()``, or ``(*)`` for "none".

    Raises:
        InvalidArgumentError: shapes, a share of another length, a target that is no class (on CUDA
            an assertion on the device), an unknown reduction.
        MismatchError: shares of different lengths where ``vocabulary`` is None; other targets on
            another rank (CPU tensors).

    Cost: two all-reduces of one and two (with smoothing three) numbers a row forward, nothing
    backward. Memory: the softmax, at least in float32, until backward.

    Source: Shoeybi et al., Megatron-LM (2019).
    """
    group = group_of(group)
    call = "vocab_parallel_cross_entropy"
    if reduction not in ("none", "mean", "sum"):
        refuse(call, group, f'reduction is {reduction!r}. Pass "mean", "sum" or "none".')
    if not 0.0 <= label_smoothing <= 1.0:
        refuse(call, group, f"label_smoothing is {label_smoothing!r}. Pass a number from 0 to 1.")
    if logits.dim() == 0 or logits.shape[:-1] != target.shape:
        refuse(
            call,
            group,
            f"logits have shape {tuple(logits.shape)} and target {tuple(target.shape)}.\n"
            "  Pass logits of shape (*target.shape, share of the vocabulary).",
        )
    if not logits.is_floating_point() or target.is_floating_point():
        refuse(
            call,
            group,
            f"logits are {logits.dtype} and target {target.dtype}.\n"
            "  Pass floating logits and class numbers.",
        )
    length = logits.shape[-1]
    total = group.size * length if vocabulary is None else vocabulary
    begin, end = bounds(total, group.size, group.rank)
    if end - begin != length:
        refuse(
            call,
            group,
            f"logits have {length} classes, and of {total} this rank's share is {end - begin}.",
        )
    check_same("cross entropy", "target", target, group)
    ignored = target == ignore_index
    known = ignored | ((target >= 0) & (target < total))
    if target.is_cpu and not bool(known.all()):
        hint = "" if vocabulary else "\n  Pass vocabulary= where the ranks' shares differ."
        refuse(
            call,
            group,
            f"target holds {int(target[~known][0])}, and classes are 0 to {total - 1}.{hint}",
        )
    here = (target >= begin) & (target < end)
    # Of the others any class does; one that nobody has stays one that CUDA refuses.
    rows = torch.where(here, target - begin, torch.where(known, 0, -1))
    losses: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, rows, here, ignored, total, label_smoothing, group
    )
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (~ignored).sum()


class _CrossEntropy(torch.autograd.Function):
    """Of each row, with x its logits less their maximum, V classes, smoothing e and class y:

    loss = log(sum exp x) - (1-e) x_y - e/V sum x
    gradient = exp x / (sum exp x) - (1-e) [class is y] - e/V
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        here: Tensor,
        ignored: Tensor,
        total: int,
        smoothing: float,
        group: Group,
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        x = logits.detach().to(wide, copy=True)
        top = x.amax(-1)
        # Part of the operation's name, hence of its signature: how many classes ranks count.
        group.all_reduce(
            *(top.data_ptr(), top.data_ptr(), top.numel(), REDUCIBLE[wide], ReduceOp.MAX),
            shape=top.shape,
            name=f"vocab_parallel_cross_entropy of {total} classes",
            place=place_of(top),
        )
        x -= top.unsqueeze(-1)
        of_class = x.gather(-1, rows.unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
        sums = [of_class, x.sum(-1)] if smoothing else [of_class]
        softmax = x.exp_()
        sums.append(softmax.sum(-1))
        all_reduce_(of_all := torch.stack(sums), group=group)
        of_class, normalizer = of_all[0], of_all[-1]
        losses = normalizer.log() - (1 - smoothing) * of_class
        if smoothing:
            losses -= smoothing / total * of_all[1]
        ctx.save_for_backward(softmax.div_(normalizer.unsqueeze(-1)), rows, here, ignored)
        ctx.total, ctx.smoothing, ctx.dtype = total, smoothing, logits.dtype
        return losses.masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        softmax, rows, here, ignored = ctx.saved_tensors
        of_class = ((ctx.smoothing - 1) * here.to(softmax.dtype)).unsqueeze(-1)
        of_logits = softmax - ctx.smoothing / ctx.total
        of_logits.scatter_add_(-1, rows.unsqueeze(-1), of_class)
        of_logits *= gradient.masked_fill(ignored, 0.0).unsqueeze(-1)
        return of_logits.to(ctx.dtype), None, None, None, None, None, None
