"""What a rank has of a checkpoint: parts of tensors, and values."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from pycomm.checkpoint.boxes import Box

# The first part of each name in the file is that of a thing: "model.0.weight".
SEPARATOR = "."


@dataclasses.dataclass(frozen=True)
class Part:
    """A box of a whole tensor, and the memory that holds it or is to hold it."""

    box: Box
    tensor: Tensor


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """A tensor of the checkpoint, as far as this rank has it."""

    name: str
    shape: tuple[int, ...]  # of the whole
    dtype: torch.dtype
    parts: list[Part]
    lowest_rank_wins: bool = False  # ranks may differ; else they are equal and any may write

    @staticmethod
    def whole(name: str, tensor: Tensor, *, lowest_rank_wins: bool = False) -> TensorEntry:
        """All of a tensor."""
        shape = tuple(tensor.shape)
        part = Part(Box.whole(shape), tensor)
        return TensorEntry(name, shape, tensor.dtype, [part], lowest_rank_wins)


@dataclasses.dataclass(frozen=True)
class ValueEntry:
    """Anything else."""

    name: str
    payload: bytes
    digest: (
        str | None
    )  # must be equal on all ranks that have it; None: the lowest rank's is written


@dataclasses.dataclass
class Contents:
    """What a rank can write."""

    tensors: list[TensorEntry] = dataclasses.field(default_factory=list)
    values: list[ValueEntry] = dataclasses.field(default_factory=list)

    def add(self, other: Contents) -> None:
        """Take in another's."""
        self.tensors += other.tensors
        self.values += other.values


@dataclasses.dataclass
class Wanted:
    """What a rank is to read: into the parts of tensors, and values by name."""

    tensors: list[TensorEntry] = dataclasses.field(default_factory=list)
    values: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Wanted) -> None:
        """Take in another's."""
        self.tensors += other.tensors
        self.values += other.values


def joined(thing: str, name: str) -> str:
    """The name in the file of something that belongs to a thing."""
    return f"{thing}{SEPARATOR}{name}"


def path_of(name: str) -> tuple[str, ...]:
    """Where a name stands in the nested dicts: under its thing."""
    return tuple(name.split(SEPARATOR, 1))


def shown(argument: object) -> str:
    """What a user passed, for errors: short things as they are, of others the type."""
    if isinstance(argument, (str, bytes, int, float, os.PathLike)) or argument is None:
        return repr(argument)
    return f"of type {type(argument).__name__}"


def listed(texts: list[str], most: int = 5) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
