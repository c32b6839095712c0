"""What the ranks of a job that is broken on purpose see: an event is a line of JSON in a file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    """Written by one rank, with the steady clock that all ranks of a machine share."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = open(_path(folder, rank), "a")  # noqa: SIM115

    def write(self, event: str, **fields: object) -> None:
        line = {"event": event, "t": time.monotonic(), "process": os.getpid(), **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def read(folder: Path, rank: int) -> list[Line]:
    """The lines of a rank, but one that is only half there; a rank that never wrote has none."""
    path = _path(folder, rank)
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"
