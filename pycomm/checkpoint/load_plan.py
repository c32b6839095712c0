"""Who reads what: torch's LoadPlanner over what a rank wants."""

from __future__ import annotations

import io
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pycomm.checkpoint.contents import TensorEntry, Wanted
from pycomm.checkpoint.values import decoded
from pycomm.errors import InvalidArgumentError


class Planner(LoadPlanner):
    """Reads values, and boxes of tensors into memory that is there. Torch finds the overlaps."""

    def __init__(self, wanted: Wanted, metadata: Metadata) -> None:
        self._wanted = wanted
        self._metadata = metadata
        self._parts = {
            (entry.name, part.box.offsets): part.tensor
            for entry in wanted.tensors
            for part in entry.parts
        }
        self._decoded: dict[bytes, Any] = {}
        self.values: dict[str, Any] = {}
        """Those that were read, by name."""

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: what is wanted is known."""

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads.

        Raises:
            InvalidArgumentError: the checkpoint lacks elements.
        """
        items = [_value_item(name) for name in self._wanted.values]
        for entry in self._wanted.tensors:
            items += self._tensor_items(entry)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: each rank reads for itself."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value; those of one param group are the same for each of its parameters."""
        payload = value.getvalue()
        if payload not in self._decoded:
            self._decoded[payload] = decoded(payload)
        self.values[read_item.dest_index.fqn] = self._decoded[payload]

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where what an item reads belongs."""
        index = read_item.dest_index
        assert index.offset is not None
        place = self._parts[index.fqn, tuple(index.offset)].detach()
        for dim, (begin, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, begin, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it lies where it belongs."""

    def _tensor_items(self, entry: TensorEntry) -> list[ReadItem]:
        stored = self._metadata.state_dict_metadata[entry.name]
        assert isinstance(stored, TensorStorageMetadata)
        chunks = [
            ChunkStorageMetadata(torch.Size(part.box.offsets), torch.Size(part.box.sizes))
            for part in entry.parts
        ]
        items = create_read_items_for_chunk_list(entry.name, stored, chunks)
        found = sum(math.prod(item.lengths) for item in items)
        asked = sum(part.box.count for part in entry.parts)
        if found != asked:
            raise InvalidArgumentError(
                f"the checkpoint is damaged: of {asked} elements of '{entry.name}' it has {found}."
            )
        return items


def _value_item(name: str) -> ReadItem:
    none = torch.Size((0,))
    index = MetadataIndex(name)
    return ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
