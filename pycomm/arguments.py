"""What collectives ask of their arguments, checked before anything is sent."""

import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from pycomm import device
from pycomm._core import Algorithm, DType, Group, ReduceOp
from pycomm.errors import InvalidArgumentError

REDUCIBLE = {
    torch.bool: DType.BOOL,
    torch.uint8: DType.UINT8,
    torch.int8: DType.INT8,
    torch.int16: DType.INT16,
    torch.int32: DType.INT32,
    torch.int64: DType.INT64,
    torch.float16: DType.FLOAT16,
    torch.bfloat16: DType.BFLOAT16,
    torch.float32: DType.FLOAT32,
    torch.float64: DType.FLOAT64,
    torch.complex64: DType.COMPLEX64,
    torch.complex128: DType.COMPLEX128,
}

MOVABLE = REDUCIBLE | {
    torch.float8_e4m3fn: DType.FLOAT8_E4M3FN,
    torch.float8_e4m3fnuz: DType.FLOAT8_E4M3FNUZ,
    torch.float8_e5m2: DType.FLOAT8_E5M2,
    torch.float8_e5m2fnuz: DType.FLOAT8_E5M2FNUZ,
}
if hasattr(torch, "float8_e8m0fnu"):  # PyTorch 2.7 and later
    MOVABLE[torch.float8_e8m0fnu] = DType.FLOAT8_E8M0FNU

_SUM, _AVG = ReduceOp.SUM, ReduceOp.AVG  # looking a member up costs as much as all other checks
_BITWISE = frozenset({ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR})
_ALGORITHMS = {"direct": Algorithm.DIRECT, "ring": Algorithm.RING} | {
    "gather_fold": Algorithm.GATHER_FOLD
}


def refuse(call: str, group: Group, problem: str) -> NoReturn:
    """Raise ``InvalidArgumentError`` with the call and the rank in front."""
    raise InvalidArgumentError(f"{call} on rank {group.rank}: {problem}")


def reducible(call: str, argument: str, t: Tensor, op: ReduceOp, group: Group) -> DType:
    """The core's dtype for a tensor that ``op`` can reduce."""
    dtype = _dtype(call, argument, t, group, REDUCIBLE)
    if op is not _SUM:
        _check_op(call, argument, t, op, group)
    return dtype


def movable(call: str, argument: str, t: Tensor, group: Group) -> DType:
    """The core's dtype for a tensor that is only moved."""
    return _dtype(call, argument, t, group, MOVABLE)


def _dtype(
    call: str, argument: str, t: Tensor, group: Group, supported: dict[torch.dtype, DType]
) -> DType:
    if not isinstance(t, Tensor):
        refuse(call, group, f"{argument} is a {type(t).__name__}. Pass a torch.Tensor.")
    if not device.supported(t):
        refuse(
            call,
            group,
            f"{argument} is on {t.device}, and pycomm moves CPU and CUDA tensors only.\n"
            f"  Pass {argument}.cpu() and copy the result back.",
        )
    if t.is_nested:
        refuse(
            call,
            group,
            f"{argument} is a nested tensor, of several shapes.\n"
            f"  Pass the tensors of {argument}.unbind(), or a padded one "
            f"(torch.nested.to_padded_tensor({argument}, 0)).",
        )
    if t.layout is not torch.strided:
        refuse(call, group, f"{argument} has layout {t.layout}. Pass {argument}.to_dense().")
    dtype = supported.get(t.dtype)
    if dtype is None:
        remedy = f"  Convert it first, or pass {argument}.view(torch.uint8)."
        if t.is_quantized:
            remedy = f"  Pass {argument}.dequantize(), or {argument}.int_repr()."
        elif t.dtype in MOVABLE:
            remedy = f"  float8 is only moved: reduce {argument}.to(torch.bfloat16)."
        elif supported is REDUCIBLE:  # bytes of a wider number do not add up to it
            remedy = f"  Convert it to one of them first, such as {argument}.to(torch.{_wider(t)})."
        names = ", ".join(str(known).removeprefix("torch.") for known in supported)
        refuse(call, group, f"{argument} has {t.dtype}; supported are {names}.\n{remedy}")
    return dtype


def _wider(t: Tensor) -> str:
    """A dtype that reduces what the dtype of ``t`` holds."""
    return "complex64" if t.dtype.is_complex else "int64"


def _check_op(call: str, argument: str, t: Tensor, op: ReduceOp, group: Group) -> None:
    """Refuse what the core's ``can_reduce`` says no to."""
    if not isinstance(op, ReduceOp):
        names = ", ".join(member.name for member in ReduceOp)
        refuse(call, group, f"op is {op!r}. Pass a pycomm.ReduceOp: {names}.")
    floating, is_complex = t.dtype.is_floating_point, t.dtype.is_complex
    if op is _AVG and not floating and not is_complex:
        refuse(
            call,
            group,
            f"AVG needs a floating dtype, and {argument} has {t.dtype}.\n"
            f"  Reduce with SUM and divide as you wish to round, or pass {argument}.float().",
        )
    if op in _BITWISE and (floating or is_complex):
        refuse(
            call,
            group,
            f"{op.name} needs an integer dtype or bool, and {argument} has {t.dtype}.\n"
            f"  Pass a view of its bits, such as {argument}.view(torch.uint8).",
        )
    if is_complex and op is not _AVG:
        refuse(
            call,
            group,
            f"complex numbers are reduced with SUM and AVG, and op is {op.name} "
            f"({argument} has {t.dtype}).\n  Reduce torch.view_as_real({argument}) for the op of "
            f"each part, or all_gather({argument}) and combine the rows.",
        )


def check_scales(call: str, t: Tensor, prescale: float, postscale: float, group: Group) -> None:
    """Refuse factors that ``t`` cannot be multiplied by. Called only if one of them is not 1."""
    for name, factor in (("prescale", prescale), ("postscale", postscale)):
        if not isinstance(factor, numbers.Real):  # NumPy's scalars too
            refuse(call, group, f"{name} is {factor!r}. Pass a number, such as 0.5.")
        if factor != 1 and not (t.dtype.is_floating_point or t.dtype.is_complex):
            refuse(
                call,
                group,
                f"{name} is {factor!r}, and {t.dtype} has no fractions to scale.\n"
                "  Leave it at 1.0, or convert the tensor to a floating dtype.",
            )


def algorithm_named(call: str, algorithm: Algorithm | str, group: Group) -> Algorithm:
    """The core's algorithm, which may be given by its name."""
    if isinstance(algorithm, Algorithm):
        return algorithm
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        names = ", ".join(map(repr, _ALGORITHMS))
        refuse(
            call,
            group,
            f"algorithm is {algorithm!r}.\n"
            f"  Pass {names}, a pycomm.Algorithm, or None to let the cost model choose.",
        )
    return _ALGORITHMS[algorithm]


Precision = Literal["exact_order"]


def reduction_algorithm(
    call: str,
    precision: Precision | None,
    group: Group,
    algorithm: Algorithm | str | None = None,
) -> Algorithm:
    """The core's algorithm of a reduction that must, or need not, have the canonical order."""
    chosen = Algorithm.AUTO if algorithm is None else algorithm_named(call, algorithm, group)
    if precision is None:
        return chosen
    if precision != "exact_order":
        refuse(
            call,
            group,
            f"precision is {precision!r}.\n"
            '  Pass "exact_order" for the same bits at every message size, on GPUs too; or None.',
        )
    if chosen is Algorithm.RING:
        refuse(
            call,
            group,
            'precision is "exact_order", and algorithm is "ring", which folds in another order.\n'
            "  Leave one of them out.",
        )
    return Algorithm.EXACT_ORDER if chosen is Algorithm.AUTO else chosen


def root_rank(call: str, root: int, group: Group) -> int:
    return rank_of(call, "root", root, group)


def rank_of(call: str, argument: str, rank: object, group: Group) -> int:
    number = integer(rank)
    if number is None or not 0 <= number < group.size:
        of_type = f" of type {type(rank).__name__}" if number is None else ""
        refuse(
            call,
            group,
            f"{argument} is {rank!r}{of_type}, and the group has {group.size} ranks.\n"
            f"  Pass a rank from 0 to {group.size - 1}, a whole number.",
        )
    return number


def integer(value: Any) -> int | None:
    """What Python takes for a whole number (NumPy's are), but True and False."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def seconds(call: str, timeout_s: float | None, group: Group) -> float:
    """The core's timeout; its 0 is the group's default."""
    if timeout_s is None:
        return 0.0
    if not isinstance(timeout_s, numbers.Real) or not 0 < timeout_s < math.inf:
        refuse(
            call,
            group,
            f"timeout_s is {timeout_s!r}.\n"
            "  Pass a positive number of seconds, or None for the group's default.",
        )
    return float(timeout_s)


def divided(call: str, argument: str, t: Tensor, group: Group) -> int:
    """A ``p``-th of dimension 0, which is cut into one block for each rank."""
    p = group.size
    if t.dim() == 0:
        refuse(
            call,
            group,
            f"{argument} has no dimension to cut into {p} blocks.\n"
            f"  Pass a tensor of shape (p*k, ...), here ({p},) or ({p}*k, ...).",
        )
    rows = t.shape[0]
    if rows % p:
        refuse(
            call,
            group,
            f"{argument}.shape[0] is {rows}, which world size {p} does not divide.\n"
            f"  Pad dimension 0 to {-(-rows // p) * p}.",
        )
    return rows // p


def splits_of(call: str, argument: str, splits: Sequence[int], group: Group) -> list[int]:
    """Rows of dimension 0 for each rank."""
    rows = [integer(n) for n in splits] if isinstance(splits, Iterable) else []
    counts = [n for n in rows if n is not None and n >= 0]
    if not len(rows) == len(counts) == group.size:
        refuse(
            call,
            group,
            f"{argument} is {splits!r}, and the group has {group.size} ranks.\n"
            f"  Pass {group.size} numbers of rows, none of them negative.",
        )
    return counts


def fits_input(call: str, output: Tensor, input: Tensor, group: Group) -> None:
    """Refuse an output of another dtype than ``input``, or on another device."""
    if output.dtype is not input.dtype:
        refuse(
            call,
            group,
            f"output has {output.dtype} and input has {input.dtype}.\n"
            f"  Pass an output of dtype={input.dtype}.",
        )
    if output.device != input.device:
        refuse(
            call,
            group,
            f"output is on {output.device} and input is on {input.device}.\n"
            f"  Pass both on one device: output.to('{input.device}') receives it.",
        )
