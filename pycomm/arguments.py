"""What collectives ask of their arguments, checked before anything is sent."""

import math
from typing import NoReturn

import torch
from torch import Tensor

from pycomm._core import DType, Group, ReduceOp
from pycomm.errors import InvalidArgumentError

REDUCIBLE = {
    torch.uint8: DType.UINT8,
    torch.int8: DType.INT8,
    torch.int16: DType.INT16,
    torch.int32: DType.INT32,
    torch.int64: DType.INT64,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float32: DType.FLOAT32,
    torch.float64: DType.FLOAT64,
}

MOVABLE = REDUCIBLE | {
    torch.bool: DType.BOOL,
    # The core has no complex numbers: their bytes travel. The operation's name then carries the
    # dtype, so that a peer that sends other elements of the same bytes is still noticed.
    torch.complex64: DType.UINT8,
    torch.complex128: DType.UINT8,
}

_AVG = ReduceOp.AVG  # looking a member up costs as much as all other checks
_FLOATING = frozenset({DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32, DType.FLOAT64})


def refuse(call: str, group: Group, problem: str) -> NoReturn:
    """Raise ``InvalidArgumentError`` with the call and the rank in front."""
    raise InvalidArgumentError(f"{call} on rank {group.rank}: {problem}")


def reducible(call: str, t: Tensor, op: ReduceOp, group: Group) -> DType:
    """The core's dtype for a tensor that ``op`` can reduce."""
    dtype = _dtype(call, "t", t, group, REDUCIBLE)
    if op is _AVG and dtype not in _FLOATING:
        refuse(
            call,
            group,
            f"AVG needs a floating dtype, and t has {t.dtype}.\n"
            "  Reduce with SUM and divide as you wish to round, or pass t.float().",
        )
    if not isinstance(op, ReduceOp):
        refuse(call, group, f"op is {op!r}. Pass a pycomm.ReduceOp: SUM, AVG, MIN, MAX or PROD.")
    return dtype


def movable(call: str, argument: str, t: Tensor, group: Group) -> tuple[DType, int, str]:
    """The core's dtype for a tensor that is only moved, its count, and its name if it needs one."""
    dtype = _dtype(call, argument, t, group, MOVABLE)
    if t.dtype.is_complex:
        return dtype, t.numel() * t.element_size(), str(t.dtype)
    return dtype, t.numel(), ""


def _dtype(
    call: str, argument: str, t: Tensor, group: Group, supported: dict[torch.dtype, DType]
) -> DType:
    if not isinstance(t, Tensor):
        refuse(call, group, f"{argument} is a {type(t).__name__}. Pass a torch.Tensor.")
    if not t.is_cpu:
        refuse(
            call,
            group,
            f"{argument} is on {t.device}, and pycomm moves CPU tensors only.\n"
            f"  Pass {argument}.cpu() and copy the result back.",
        )
    if t.layout is not torch.strided:
        refuse(call, group, f"{argument} has layout {t.layout}. Pass {argument}.to_dense().")
    dtype = supported.get(t.dtype)
    if dtype is None:
        remedy = f"  Convert it first, or pass {argument}.view(torch.uint8)."
        if t.dtype is torch.bool:
            remedy = "  Reduce t.to(torch.uint8): MAX is a logical or, MIN a logical and."
        elif t.dtype.is_complex and supported is REDUCIBLE:
            remedy = "  Reduce torch.view_as_real(t)."
        names = ", ".join(str(known).removeprefix("torch.") for known in supported)
        refuse(call, group, f"{argument} has {t.dtype}; supported are {names}.\n{remedy}")
    return dtype


def writable(call: str, argument: str, t: Tensor, group: Group) -> None:
    """Refuse to overwrite what autograd still needs, or cannot follow."""
    if t.requires_grad and not t.is_leaf and torch.is_grad_enabled():
        refuse(
            call,
            group,
            f"{argument} was computed from tensors that require a gradient, which overwriting it "
            f"would falsify.\n  Pass {argument}.detach(), or use all_reduce(t), which autograd "
            "follows.",
        )
    if t.is_neg() or (t.dtype.is_complex and t.is_conj()):
        refuse(
            call,
            group,
            f"{argument} is a lazily conjugated or negated view.\n"
            f"  Pass {argument}.resolve_conj().resolve_neg().",
        )


def memory_order(call: str, argument: str, t: Tensor, group: Group) -> str:
    """How the elements of a writable tensor lie in its piece of memory; "" when row-major.

    An in-place operation pairs elements by their place in memory, so ranks must agree on this. It
    becomes part of the operation's name, and with that of its signature.
    """
    if t.is_contiguous():
        return ""
    dims = sorted(
        (dim for dim in range(t.dim()) if t.size(dim) > 1),
        key=lambda dim: t.stride()[dim],
        reverse=True,
    )
    expected = 1
    for dim in reversed(dims):
        if t.stride(dim) != expected:
            refuse(
                call,
                group,
                f"{argument} of shape {tuple(t.shape)} has strides {t.stride()}, so its elements "
                "do not fill one piece of memory and it cannot be overwritten in one go.\n"
                f"  Pass a contiguous tensor and copy the result into {argument}.",
            )
        expected *= t.size(dim)
    return f"memory order {tuple(dims)}"


def root_rank(call: str, root: int, group: Group) -> int:
    if not isinstance(root, int) or not 0 <= root < group.size:
        refuse(
            call,
            group,
            f"root is {root!r}, and the group has {group.size} ranks.\n"
            f"  Pass a rank from 0 to {group.size - 1}.",
        )
    return root


def seconds(call: str, timeout_s: float | None, group: Group) -> float:
    """The core's timeout; its 0 is the group's default."""
    if timeout_s is None:
        return 0.0
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        refuse(
            call,
            group,
            f"timeout_s is {timeout_s!r}.\n"
            "  Pass a positive number of seconds, or None for the group's default.",
        )
    return float(timeout_s)
