"""A checkpoint on disk, open for reading."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from pycomm.checkpoint import checksums, folder, record
from pycomm.checkpoint.checksums import Checksums
from pycomm.checkpoint.contents import SEPARATOR, TensorEntry, Wanted
from pycomm.checkpoint.host import host
from pycomm.checkpoint.load_plan import Planner
from pycomm.errors import InvalidArgumentError


@dataclasses.dataclass(frozen=True)
class Saved:
    """What is there, and what it says about itself."""

    folder: Path
    metadata: Metadata
    checksums: Checksums | None  # None: written without
    digest: str  # of metadata and checksums: equal where ranks see the same checkpoint
    record: record.Record

    @staticmethod
    def open(path: Path) -> Saved:
        """Read what the checkpoint holds; ``.metadata`` is a pickle, which runs code on loading.

        Raises:
            InvalidArgumentError: there is none, it is damaged, or another program wrote it.
        """
        place = folder.find(path)
        return folder.reading(place, lambda: Saved._at(place))

    @staticmethod
    def _at(place: Path) -> Saved:
        summed, found_sums = b"", None
        if (place / checksums.NAME).exists():
            summed = folder.reading(place, (place / checksums.NAME).read_bytes)
            found_sums = folder.reading(
                place / checksums.NAME, lambda: Checksums.parsed(place, summed)
            )
            found_sums.verify(folder.METADATA)
        payload = folder.reading(place, (place / folder.METADATA).read_bytes)
        metadata = folder.reading(place / folder.METADATA, lambda: pickle.loads(payload))
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise InvalidArgumentError(f"{place / folder.METADATA} is not that of a checkpoint.")
        digest = hashlib.sha256(payload + summed).hexdigest()
        saved = Saved(place, metadata, found_sums, digest, {})
        if record.NAME not in metadata.state_dict_metadata:
            raise InvalidArgumentError(
                f"{place} was not written by pycomm.\n  Read it with torch.distributed.checkpoint."
            )
        own = Wanted(values=[record.NAME])
        saved.check_files(own)
        found = saved.read(own)[record.NAME]
        version = int(found["format"])
        if version > record.FORMAT:
            raise InvalidArgumentError(
                f"{place} has format {version}, and this pycomm knows {record.FORMAT}.\n"
                "  Load it with the version that wrote it, or a newer one."
            )
        return dataclasses.replace(saved, record=found)

    @property
    def kinds(self) -> dict[str, str]:
        """Of the things in it, by name."""
        kinds: dict[str, str] = self.record["kinds"]
        return kinds

    def names(self, thing: str) -> Iterator[str]:
        """What belongs to a thing, without the thing's own name in front."""
        prefix = thing + SEPARATOR
        for name in self.metadata.state_dict_metadata:
            if name.startswith(prefix):
                yield name[len(prefix) :]

    def tensor(self, name: str) -> TensorStorageMetadata | None:
        """Shape and dtype of a tensor; None if a value, or nothing, has that name."""
        stored = self.metadata.state_dict_metadata.get(name)
        return stored if isinstance(stored, TensorStorageMetadata) else None

    def problem(self, entry: TensorEntry) -> str | None:
        """Why a tensor cannot be read, if it cannot."""
        stored = self.tensor(entry.name)
        if stored is None:
            known = entry.name in self.metadata.state_dict_metadata
            return f"'{entry.name}' is {'no tensor in it' if known else 'missing'}"
        there, here = tuple(stored.size), entry.shape
        if there != here:
            return f"'{entry.name}' has shape {there} in it, and {here} here"
        if stored.properties.dtype is not entry.dtype:
            return f"'{entry.name}' is {stored.properties.dtype} in it, and {entry.dtype} here"
        return None

    def check_files(self, wanted: Wanted) -> None:
        """Look whether all that would be read is there, and is what was written.

        Raises:
            InvalidArgumentError: a file is missing, or not as it was.
        """
        for name, items in self._by_file(wanted).items():
            file = self.folder / name
            size = folder.reading(file, lambda file=file: os.stat(file).st_size)  # type: ignore[misc]
            places = [self.metadata.storage_data[item.storage_index] for item in items]
            needed = max(place.offset + place.length for place in places)
            if size < needed:
                raise InvalidArgumentError(
                    f"{file} on {host()} has {size} bytes, and {needed} are needed: it was "
                    "cut off, or not copied as a whole.\n  Take another checkpoint."
                )
            if self.checksums is not None:
                ranges = [(place.offset, place.offset + place.length) for place in places]
                folder.reading(
                    file,
                    lambda sums=self.checksums, name=name, ranges=ranges: sums.verify(name, ranges),  # type: ignore[misc]
                )

    def read(self, wanted: Wanted) -> dict[str, Any]:
        """Read tensors to where they belong; returns the values.

        Raises:
            InvalidArgumentError: it cannot be read. Tensors may be overwritten in part then.
        """
        reader = FileSystemReader(self.folder)
        planner = Planner(wanted, self.metadata)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        for name, items in self._by_file(wanted).items():
            plan = LoadPlan(items)
            folder.reading(
                self.folder / name,
                lambda plan=plan: reader.read_data(plan, planner).wait(),  # type: ignore[misc]
            )
        return planner.values

    def read_all(self) -> dict[str, Any]:
        """All tensors and values, by name."""
        names = self.metadata.state_dict_metadata
        tensors = {
            name: torch.empty(stored.size, dtype=stored.properties.dtype)
            for name, stored in names.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        wanted = Wanted(
            [TensorEntry.whole(name, tensor) for name, tensor in tensors.items()],
            [name for name in names if name not in tensors],
        )
        self.check_files(wanted)
        return {**tensors, **self.read(wanted)}

    def _by_file(self, wanted: Wanted) -> dict[str, list[ReadItem]]:
        items = Planner(wanted, self.metadata).create_local_plan().items
        found: dict[str, list[ReadItem]] = {}
        for item in items:
            place = self.metadata.storage_data[item.storage_index]
            found.setdefault(place.relative_path, []).append(item)
        return found
