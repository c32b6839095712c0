"""Where tensors lie: what collectives ask of the memory that they read and write."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pycomm._core import Group
from pycomm.arguments import refuse


def dense(t: Tensor) -> Tensor:
    """``t`` if its elements lie in row-major order in one piece, as they are; else such a copy."""
    if t.is_contiguous() and not t.is_neg() and not t.is_conj():
        return t
    return t.detach().resolve_conj().resolve_neg().contiguous()


def laid_out_like(t: Tensor, wire: Tensor) -> Tensor:
    """``wire``, a contiguous tensor of the same shape, in the memory format of ``t``."""
    return wire if t.is_contiguous() else torch.empty_like(t).copy_(wire)


def dense_strides(t: Tensor) -> tuple[int, ...]:
    """The strides of ``t`` if its elements fill their memory, else contiguous ones.

    Every rank lays a gradient out in the same strides, because a reduction pairs elements by their
    place in memory.
    """
    return torch.empty_like(t, device="meta").stride()


def lies_like(t: Tensor, other: Tensor) -> bool:
    """Whether the values of two tensors of one shape lie in the same order, and as they are."""
    return (
        type(t) is Tensor  # a subclass may lie anywhere
        and t.stride() == other.stride()
        and not t.is_neg()
        and not t.is_conj()
    )


def writable(call: str, argument: str, t: Tensor, group: Group) -> None:
    """Refuse to overwrite what autograd still needs, or cannot follow."""
    if t.requires_grad and not t.is_leaf and torch.is_grad_enabled():
        refuse(
            call,
            group,
            f"{argument} was computed from tensors that require a gradient, which overwriting it "
            f"would falsify.\n  Pass {argument}.detach(), or use the call that returns a new "
            "tensor, which autograd follows.",
        )
    if t.is_neg() or t.is_conj():
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


def given_output(
    call: str, output: Tensor, shapes: list[tuple[int, ...]], input: Tensor, group: Group
) -> None:
    """Refuse an output that does not have one of ``shapes``, the dtype of ``input``, no gaps."""
    problem = ""
    if tuple(output.shape) not in shapes:
        problem = (
            f"output has shape {tuple(output.shape)}, and {group.size} ranks' inputs of shape "
            f"{tuple(input.shape)} need {' or '.join(map(str, shapes))}."
        )
    elif output.dtype is not input.dtype:
        problem = f"output has {output.dtype} and input has {input.dtype}."
    elif output.device != input.device:
        problem = f"output is on {output.device} and input is on {input.device}."
    elif not output.is_contiguous():
        problem = f"output of shape {tuple(output.shape)} has strides {output.stride()}."
    if problem:
        remedy = f"input.new_empty({shapes[0]})"
        refuse(call, group, f"{problem}\n  Pass a contiguous output: {remedy}.")


def refuse_overlap(
    call: str, block: Tensor, whole: Tensor, names: tuple[str, str], group: Group
) -> None:
    """Refuse memory in common, but for one case: ``block`` may be its own place in ``whole``.

    That is: ``whole`` consists of one block for each rank, and ``block`` is this rank's.
    """
    begin, end = _extent(block)
    whole_begin, whole_end = _extent(whole)
    if end <= whole_begin or whole_end <= begin:
        return
    own = whole_begin + group.rank * block.numel() * block.element_size()
    if begin == own and whole.is_contiguous() and block.is_contiguous():
        return
    refuse(
        call,
        group,
        f"{names[0]} lies in the memory of {names[1]}, elsewhere than in this rank's place "
        f"there.\n  Pass {names[1]}'s block {group.rank} of {group.size}, or memory of its own "
        f"({names[0]}.clone()).",
    )


def refuse_any_overlap(call: str, output: Tensor, input: Tensor, group: Group) -> None:
    begin, end = _extent(output)
    input_begin, input_end = _extent(input)
    if end > input_begin and input_end > begin:
        refuse(
            call,
            group,
            "output and input have memory in common, and every block of the input goes to "
            "another place.\n  Pass an output of its own: torch.empty_like(input).",
        )


def refuse_shared_memory(call: str, tensors: Sequence[Tensor], group: Group) -> None:
    """Refuse tensors that would overwrite each other.

    Of strided views that mesh, such as even and odd columns, only equal ones are refused.
    """
    by_place = sorted((_extent(t), index) for index, t in enumerate(tensors) if t.numel() > 0)
    for ((begin, end), index), ((next_begin, _), next_index) in itertools.pairwise(by_place):
        first, second = tensors[index], tensors[next_index]
        whole = first.is_contiguous() and second.is_contiguous()
        same = begin == next_begin and first.stride() == second.stride()
        if next_begin < end and (whole or same):
            refuse(
                call,
                group,
                f"tensors[{index}] and tensors[{next_index}] have memory in common, and both are "
                "overwritten.\n  Pass each once, or one of them as a copy (.clone()).",
            )


def _extent(t: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and after the last; an empty tensor has none in common."""
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    address = t.data_ptr()
    return address, address + (last + 1) * t.element_size()
