"""A batch cut into micro-batches, and what they give put together again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pycomm.errors import InvalidArgumentError


def sizes(length: int, micro_batches: int) -> list[int]:
    """Rows of each micro-batch: the first ones have one more where ``length`` does not divide."""
    each, more = divmod(length, micro_batches)
    return [each + (number < more) for number in range(micro_batches)]


def length_of(argument: str, value: Any) -> int | None:
    """Rows that all tensors of a batch have in dimension 0; None if it holds none.

    Raises:
        InvalidArgumentError: they differ.
    """
    if isinstance(value, Tensor) and value.dim() > 0:
        return len(value)
    lengths = {len(t) for t in pytree.tree_leaves(value) if _is_cut(t)}
    if len(lengths) > 1:
        raise InvalidArgumentError(
            f"the tensors of {argument} have {', '.join(map(str, sorted(lengths)))} rows.\n"
            "  Give all of them one length in dimension 0."
        )
    return lengths.pop() if lengths else None


def cut(value: Any, micro_batches: int) -> list[Any]:
    """Views of each micro-batch's rows; what has no rows goes to all."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return list(torch.split(value, sizes(len(value), micro_batches)))
    leaves, spec = pytree.tree_flatten(value)
    parts = [
        leaf.split(sizes(len(leaf), micro_batches)) if _is_cut(leaf) else [leaf] * micro_batches
        for leaf in leaves
    ]
    return [
        pytree.tree_unflatten([part[number] for part in parts], spec)
        for number in range(micro_batches)
    ]


def join(values: Sequence[Any]) -> Any:
    """Micro-batches of one structure as one batch; what has no rows, as a list."""
    flattened = [pytree.tree_flatten(value) for value in values]
    leaves = [_joined(parts) for parts in zip(*(leaves for leaves, _ in flattened), strict=True)]
    return pytree.tree_unflatten(leaves, flattened[0][1])


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with each of its tensors replaced."""
    return pytree.tree_map_only(Tensor, function, value)


def _joined(parts: Sequence[Any]) -> Any:
    return torch.cat(list(parts)) if all(map(_is_cut, parts)) else list(parts)


def _is_cut(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
