"""How a structure of tensors lies in one message."""

from __future__ import annotations

import dataclasses
import functools
import pickle
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pycomm.arguments import MOVABLE
from pycomm.errors import InvalidArgumentError

_LEAF = pytree.tree_flatten(None)[1]
_ALIGNMENT = 64  # of each tensor in a message, bytes
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor: its elements fill ``nbytes`` from ``offset`` on, in the order of its strides."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    offset: int

    nbytes: int

    @property
    def in_order(self) -> bool:
        """Whether the strides are those of a contiguous tensor."""
        return torch.empty(self.shape, device="meta").stride() == self.strides

    def view(self, memory: Tensor) -> Tensor:
        typed = memory[self.offset : self.offset + self.nbytes].view(self.dtype)
        return typed.as_strided(self.shape, self.strides)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Structure, shapes, strides, dtypes and constants: all of a message but the elements.

    Two messages whose layouts are equal differ in their elements alone.
    """

    spec: pytree.TreeSpec
    leaves: tuple[_Tensor | Any, ...]
    nbytes: int

    @functools.cached_property
    def lone(self) -> _Tensor | None:
        """Of a message that is one tensor, its elements in order, as most are."""
        if self.spec != _LEAF or not isinstance(self.leaves[0], _Tensor):
            return None
        return self.leaves[0] if self.leaves[0].in_order else None

    def is_of(self, value: Any) -> bool:
        """Whether this is the layout of a lone tensor, without making one; it may say no."""
        lone = self.lone
        return (
            lone is not None
            and type(value) is Tensor
            and value.shape == lone.shape
            and value.dtype is lone.dtype
            and value.requires_grad is lone.requires_grad
            and value.is_contiguous()
            and not value.is_conj()
            and not value.is_neg()
        )

    @staticmethod
    def of(value: Any) -> tuple[Layout, list[Tensor]]:
        """The layout of a tensor, or of tuples, lists and dicts of them, and its tensors.

        The tensors are such that their memory is what is to be sent: copies, if need be.

        Raises:
            InvalidArgumentError: it holds something else than tensors and plain constants.
        """
        lone = isinstance(value, Tensor)  # as most are
        leaves, spec = ([value], _LEAF) if lone else pytree.tree_flatten(value)
        tensors: list[Tensor] = []
        described: list[_Tensor | Any] = []
        end = 0
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    raise InvalidArgumentError(
                        f"a stage's output holds a {type(leaf).__name__}, which cannot travel.\n"
                        "  Return tensors, numbers, strings and None, in tuples, lists and dicts."
                    )
                described.append(leaf)
                continue
            tensor = _filled(leaf)
            tensors.append(tensor)
            offset = -(-end // _ALIGNMENT) * _ALIGNMENT
            described.append(
                _Tensor(
                    tuple(tensor.shape),
                    tensor.stride(),
                    tensor.dtype,
                    leaf.requires_grad,
                    offset,
                    tensor.nbytes,
                )
            )
            end = offset + tensor.nbytes
        return Layout(spec, tuple(described), end), tensors

    def pack(self, tensors: list[Tensor], where: torch.device) -> Tensor:
        """One piece of memory that holds them, on a device: a lone tensor's own, else a copy."""
        if len(tensors) == 1:
            return tensors[0] if tensors[0].device.type == where.type else tensors[0].to(where)
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=where)
        kinds = [leaf for leaf in self.leaves if isinstance(leaf, _Tensor)]
        for kind, tensor in zip(kinds, tensors, strict=True):
            if kind.nbytes:
                kind.view(memory).copy_(tensor)
        return memory

    def unpack(self, memory: Tensor) -> Any:
        """The structure, of views of ``memory``, which holds ``nbytes`` or more."""
        leaves = [
            _unpacked(leaf, memory) if isinstance(leaf, _Tensor) else leaf for leaf in self.leaves
        ]
        if self.spec == _LEAF:
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.spec)

    def requiring_gradient(self) -> list[bool]:
        """Of each tensor, whether it requires a gradient."""
        return [leaf.requires_grad for leaf in self.leaves if isinstance(leaf, _Tensor)]

    def dump(self) -> bytes:
        structure = pytree.tree_unflatten(range(len(self.leaves)), self.spec)
        return pickle.dumps((structure, self.leaves, self.nbytes), pickle.HIGHEST_PROTOCOL)

    @staticmethod
    def load(payload: bytes) -> Layout:
        structure, leaves, nbytes = pickle.loads(payload)
        return Layout(pytree.tree_flatten(structure)[1], leaves, nbytes)

    def __str__(self) -> str:
        parts = [
            f"{str(leaf.dtype).removeprefix('torch.')} {leaf.shape}"
            if isinstance(leaf, _Tensor)
            else repr(leaf)
            for leaf in self.leaves
        ]
        return ", ".join(parts) or "nothing"


def _filled(t: Tensor) -> Tensor:
    """``t`` without its graph, if its elements fill one piece of memory; else a copy that does."""
    if t.is_contiguous() and not t.is_conj() and not t.is_neg() and t.dtype in MOVABLE:
        return t.detach()
    if t.layout is not torch.strided or t.is_nested or t.dtype not in MOVABLE:
        raise InvalidArgumentError(
            f"a stage's output holds a {t.layout} tensor of {t.dtype}, which cannot travel.\n"
            "  Convert it to a dense tensor of numbers."
        )
    t = t.detach().resolve_conj().resolve_neg()
    # The strides that preserve_format gives are those of t itself if it fills its memory.
    strides = torch.empty_like(t, device="meta").stride()
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _unpacked(leaf: _Tensor, memory: Tensor) -> Tensor:
    if leaf.nbytes == 0:
        empty = torch.empty_strided(
            leaf.shape, leaf.strides, dtype=leaf.dtype, device=memory.device
        )
        return empty.requires_grad_(leaf.requires_grad)
    return leaf.view(memory).requires_grad_(leaf.requires_grad)
