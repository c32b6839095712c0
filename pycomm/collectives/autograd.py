"""Autograd through collectives.

Every collective but a MIN, MAX or PROD is linear in its input, so its gradient is its transpose,
another collective: broadcast and reduce, gather and scatter, all_gather and reduce_scatter are each
other's, all_reduce and all_to_all their own. Each module here holds such a pair. The scales of a
reduction are real, so complex gradients need no conjugation (torch's gradient of ``A z`` is
``A^H g``). Gradients of gradients work alike.

What a rank differentiates is the sum of all ranks' losses: every rank must call ``backward()``,
and on all of them the tensor must require a gradient, or on none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycomm._core import Group, ReduceOp
from pycomm.arguments import refuse

_SUM, _AVG = ReduceOp.SUM, ReduceOp.AVG


def followed(t: Tensor) -> bool:
    """Whether autograd wants to follow what is done with ``t``."""
    return t.requires_grad and torch.is_grad_enabled()


def linear(
    t: Tensor,
    function: Callable[[Tensor], Tensor],
    transpose: Callable[[Tensor], Tensor | None],
) -> Tensor:
    """``function(t)``, with ``transpose`` to turn its gradient into that of ``t``."""
    result: Tensor = _Linear.apply(t, function, transpose)  # type: ignore[no-untyped-call]
    return result


def blocking_only(call: str, group: Group, async_op: bool) -> None:
    """Refuse ``async_op`` for a tensor that autograd follows."""
    if async_op:
        refuse(
            call,
            group,
            "the tensor requires a gradient, and autograd follows only a blocking call.\n"
            "  Pass t.detach() if no gradient is wanted, or leave async_op out.",
        )


def linear_only(call: str, op: ReduceOp, group: Group) -> None:
    """Refuse a reduction that is not linear for a tensor that autograd follows."""
    if op is not _SUM and op is not _AVG:
        rows = {ReduceOp.MIN: "amin", ReduceOp.MAX: "amax"}.get(op, "prod")
        refuse(
            call,
            group,
            f"the tensor requires a gradient, and autograd follows only SUM and AVG, not {op.name}."
            "\n  Pass t.detach() if no gradient is wanted, or pycomm.all_gather(t)."
            f"{rows}(0), which autograd follows.",
        )


def gradient_factor(op: ReduceOp, prescale: float, postscale: float, group: Group) -> float:
    """What a reduction multiplies each rank's input by."""
    return prescale * postscale / (group.size if op is _AVG else 1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        function: Callable[[Tensor], Tensor],
        transpose: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        ctx.transpose = transpose
        # Without following t: grad mode is off here. A view could not be changed in place later.
        return function(t).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = gradients
        return ctx.transpose(gradient), None, None
