"""Who writes what: torch's SavePlanner over what the ranks have."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from pycomm.checkpoint import record
from pycomm.checkpoint.boxes import Box, gap_or_overlap
from pycomm.checkpoint.contents import Contents, TensorEntry, listed, path_of
from pycomm.checkpoint.record import OptimizerRecord
from pycomm.checkpoint.values import entry_of
from pycomm.errors import InvalidArgumentError
from pycomm.replicas import checksum_of


@dataclasses.dataclass(frozen=True)
class _Notes:
    """What goes with a rank's plan to rank 0."""

    digests: dict[str, str]  # of values that must be equal
    value_bytes: dict[str, int]
    lowest_rank_wins: set[str]
    checksums: dict[tuple[str, Box], int]  # of parts of tensors that must be equal
    optimizers: Mapping[str, OptimizerRecord]


class Planner(SavePlanner):
    """Offers what this rank has; on rank 0, lets each box be written once.

    Of ranks that have the same box the one with the fewest bytes so far writes it, or the lowest
    where they may differ.
    """

    def __init__(
        self,
        contents: Contents,
        kinds: Mapping[str, str],
        optimizers: Mapping[str, OptimizerRecord],
        *,
        verify: bool,
    ) -> None:
        self._verify = verify
        self._contents = contents
        self._kinds = kinds
        self._optimizers = optimizers
        self._tensors = {
            (entry.name, part.box.offsets): part.tensor
            for entry in contents.tensors
            for part in entry.parts
        }
        self._payloads = {entry.name: entry.payload for entry in contents.values}

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing: the contents are there."""

    def create_local_plan(self) -> SavePlan:
        """What this rank could write."""
        items = [
            _tensor_item(entry, part.box)
            for entry in self._contents.tensors
            for part in entry.parts
        ]
        items += [_value_item(entry.name) for entry in self._contents.values]
        values = self._contents.values
        pinned = {entry.name for entry in self._contents.tensors if entry.lowest_rank_wins}
        notes = _Notes(
            {entry.name: entry.digest for entry in values if entry.digest is not None},
            {entry.name: len(entry.payload) for entry in values},
            pinned | {entry.name for entry in values if entry.digest is None},
            self._checksums() if self._verify else {},
            self._optimizers,
        )
        return SavePlan(items, planner_data=notes)

    def _checksums(self) -> dict[tuple[str, Box], int]:
        return {
            (entry.name, part.box): checksum_of(part.tensor)
            for entry in self._contents.tensors
            if not entry.lowest_rank_wins
            for part in entry.parts
        }

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What each rank does write.

        Raises:
            InvalidArgumentError: the ranks' parts make up no whole, or differ where they must not.
        """
        notes: list[_Notes] = [plan.planner_data for plan in all_plans]
        _check_values(notes)
        own_record = entry_of(
            record.NAME, record.merged(self._kinds, [note.optimizers for note in notes])
        )
        self._payloads[own_record.name] = own_record.payload
        all_plans[0].items.append(_value_item(own_record.name))
        value_bytes = {own_record.name: len(own_record.payload)}
        for note in notes:
            value_bytes.update(note.value_bytes)
        pinned = set().union(*(note.lowest_rank_wins for note in notes))
        shared_out = share_out(all_plans, pinned, value_bytes)
        _check_replicas(notes)
        return shared_out

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """What an item of this rank's plan stands for."""
        index = write_item.index
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self._payloads[index.fqn])
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)].detach()


def share_out(
    plans: Sequence[SavePlan], lowest_rank_wins: set[str], value_bytes: Mapping[str, int]
) -> tuple[list[SavePlan], Metadata]:
    """Give each item to one of the ranks that offer it.

    Raises:
        InvalidArgumentError: a tensor's parts do not fit together.
    """
    offers: dict[str, dict[Box | None, tuple[WriteItem, list[int]]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            boxes = offers.setdefault(item.index.fqn, {})
            boxes.setdefault(_box_of(item), (item, []))[1].append(rank)
    problems = [problem for name, boxes in offers.items() if (problem := _problem(name, boxes))]
    if problems:
        raise InvalidArgumentError(
            f"the ranks' parts make up no whole: {listed(problems)}.\n"
            "  Let the group of this call be all ranks that share the model, each with its part."
        )
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    jobs: list[tuple[WriteItem, list[int]]] = []
    for name, boxes in offers.items():
        for item, ranks in boxes.values():
            data = item.tensor_data
            if data is None:
                stored[name] = BytesStorageMetadata()
            else:
                whole = TensorStorageMetadata(data.properties, data.size, [])
                tensor = stored.setdefault(name, whole)
                assert isinstance(tensor, TensorStorageMetadata)
                index = dataclasses.replace(item.index, index=len(tensor.chunks))
                tensor.chunks.append(data.chunk)
                item = dataclasses.replace(item, index=index)
            jobs.append((item, ranks[:1] if name in lowest_rank_wins else ranks))
    sizes = [value_bytes.get(item.index.fqn, 0) + _bytes_of(item) for item, _ in jobs]
    loads = [0] * len(plans)
    writer: dict[int, int] = {}
    for number in sorted(range(len(jobs)), key=lambda number: -sizes[number]):
        _, ranks = jobs[number]
        writer[number] = min(ranks, key=lambda rank: (loads[rank], rank))
        loads[writer[number]] += sizes[number]
    shared_out = [
        SavePlan([item for number, (item, _) in enumerate(jobs) if writer[number] == rank])
        for rank in range(len(plans))
    ]
    return shared_out, Metadata(stored, planner_data={name: path_of(name) for name in stored})


def _check_values(notes: Sequence[_Notes]) -> None:
    known: dict[str, tuple[int, str]] = {}
    different: dict[str, str] = {}
    for rank, note in enumerate(notes):
        for name, digest in note.digests.items():
            first, its_digest = known.setdefault(name, (rank, digest))
            if its_digest != digest:
                different.setdefault(name, f"'{name}' (ranks {first} and {rank})")
    if different:
        raise InvalidArgumentError(
            f"ranks have different values, and one of each is saved: "
            f"{listed(list(different.values()))}.\n"
            "  Make them equal, schedulers by the same param groups and options on every rank; or "
            "save what each rank has of its own as one value: pycomm.all_gather_object(value)."
        )


def _check_replicas(notes: Sequence[_Notes]) -> None:
    known: dict[tuple[str, Box], tuple[int, int]] = {}
    different: dict[str, str] = {}
    for rank, note in enumerate(notes):
        for part, checksum in note.checksums.items():
            first, its_checksum = known.setdefault(part, (rank, checksum))
            if its_checksum != checksum:
                name = part[0]
                different.setdefault(name, f"'{name}' (ranks {first} and {rank})")
    if different:
        raise InvalidArgumentError(
            f"ranks have replicas that are not the same: {listed(list(different.values()))}.\n"
            "  Make them the same with pycomm.broadcast_parameters(model) and "
            "pycomm.broadcast_optimizer_state(optimizer), and look for what made them differ "
            "(pycomm.verify_replicas); or pass verify=False, and one of each is saved."
        )


def _problem(name: str, boxes: Mapping[Box | None, tuple[WriteItem, list[int]]]) -> str | None:
    """What keeps a tensor's parts from making it up."""
    (first, ranks), *others = boxes.values()
    for other, its_ranks in others:
        if _looks(other) != _looks(first):
            return (
                f"'{name}' is {_looks(first)} on rank {ranks[0]} and {_looks(other)} on rank "
                f"{its_ranks[0]}"
            )
    data = first.tensor_data
    if data is None:
        return None
    found = gap_or_overlap(data.size, [box for box in boxes if box is not None])
    return found and f"'{name}' of shape {tuple(data.size)}: {found}"


def _looks(item: WriteItem) -> str:
    data = item.tensor_data
    return "no tensor" if data is None else f"{data.properties.dtype} {tuple(data.size)}"


def _box_of(item: WriteItem) -> Box | None:
    if item.tensor_data is None:
        return None
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _bytes_of(item: WriteItem) -> int:
    data = item.tensor_data
    if data is None:
        return 0
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


def _tensor_item(entry: TensorEntry, box: Box) -> WriteItem:
    return WriteItem(
        MetadataIndex(entry.name, box.offsets),
        WriteItemType.TENSOR if box == Box.whole(entry.shape) else WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)),
            TensorProperties(dtype=entry.dtype),
            torch.Size(entry.shape),
        ),
    )


def _value_item(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)
