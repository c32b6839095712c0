"""What a round leaves in /dev/shm, where pycomm puts nothing: its memory has no name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

FOLDER = Path("/dev/shm")

# How names of MPI's begin: a rank that does not come to MPI_Finalize leaves them.
_OF_MPI = ("sm_segment.", "vader_segment.", "ompi", "pmix", "prte")


def names() -> set[str]:
    return {path.name for path in FOLDER.iterdir()}


def left_since(before: Iterable[str]) -> list[str]:
    """What is new, not MPI's, and has no process: others work on this machine, too."""
    new = {name for name in names() - set(before) if not name.startswith(_OF_MPI)}
    return sorted(new - set(_in_use()) if new else new)


def _in_use() -> Iterator[str]:
    """Names that some process has open or mapped."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            paths = [line.split(maxsplit=5)[-1] for line in _lines(process / "maps")]
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    paths.append(os.readlink(descriptor))
            yield from (Path(path).name for path in paths if path.startswith(f"{FOLDER}/"))


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()
