"""The folder of a checkpoint: written under another name, and then put in place.

::

    path.unfinished    being written; without ``.metadata`` until everything else is there
    path               a checkpoint
    path.replaced      the previous one, between the two renames that replace it

Whatever moment a crash chooses, ``path`` or else ``path.replaced`` is a whole checkpoint, if there
was one before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pycomm.checkpoint import checksums, claim
from pycomm.checkpoint.claim import Claim
from pycomm.checkpoint.contents import listed, shown
from pycomm.checkpoint.host import host
from pycomm.checkpoint.reason import disk_error, reason_of, refused_type
from pycomm.errors import InvalidArgumentError

T = TypeVar("T")

METADATA = ".metadata"
_BEFORE = "What was saved before is as it was."
_PLACED = "The new checkpoint is in place."
SECONDS_TO_SEE = 5.0
"""That a network file system may take to show one host what another has written."""


def absolute(path: str | os.PathLike[str]) -> Path:
    """Where a checkpoint is, whatever the working directory will be.

    Raises:
        InvalidArgumentError: that is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise InvalidArgumentError(
            f"path is {shown(path)}.\n  Pass the path of a folder, and state after it."
        )
    text = os.fspath(path)
    if not isinstance(text, str) or "://" in text:
        raise InvalidArgumentError(f"path is {path!r}.\n  Pass the path of a folder, as a str.")
    if "\0" in text:
        raise InvalidArgumentError(f"path is {path!r}.\n  Paths have no NUL in them.")
    place = Path(os.path.abspath(text))
    if not place.name:
        raise InvalidArgumentError(f"path is {path!r}.\n  Pass the path of a folder of its own.")
    return place


def unfinished(path: Path) -> Path:
    """Where the next checkpoint at ``path`` is written."""
    return path.with_name(path.name + ".unfinished")


def replaced(path: Path) -> Path:
    """Where the previous checkpoint is while it is replaced."""
    return path.with_name(path.name + ".replaced")


def prepare(path: Path) -> Claim:
    """Make an empty folder to write to, with a claim on it.

    Raises:
        InvalidArgumentError: ``path`` is something else than a checkpoint, cannot be written, or is
            being written by others.
    """
    with _explained("write", path.parent, _BEFORE):
        if path.parent.exists() and not path.parent.is_dir():
            raise InvalidArgumentError(f"{path.parent} is no folder.\n  Save to another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim.alone_in(path.parent):
            for place in (path, unfinished(path), replaced(path)):
                _refuse_other(place)
            if other := claim.holder(unfinished(path)):
                raise InvalidArgumentError(
                    f"{unfinished(path)} is being written by another save, from {other}.\n"
                    "  Let one group save to a path, or give each a path of its own."
                )
            if replaced(path).exists():  # a crash between two renames, or after both
                if is_checkpoint(path):
                    shutil.rmtree(replaced(path))
                else:
                    replaced(path).rename(path)
            if unfinished(path).exists():
                shutil.rmtree(unfinished(path))
            unfinished(path).mkdir()
            return Claim(unfinished(path))


def sees(path: Path, token: str) -> bool:
    """Whether this rank's ``path`` is the one that rank 0 prepared."""
    deadline = time.monotonic() + SECONDS_TO_SEE
    while True:
        if unfinished(path).is_dir() and token in os.listdir(unfinished(path)):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def check_own(path: Path, token: str) -> None:
    """See to it that what is written at ``path`` is still one's own. Any rank may ask.

    Raises:
        InvalidArgumentError: another group's save took its place, where locks could not prevent it.
    """
    if not (unfinished(path) / token).exists():
        raise InvalidArgumentError(
            f"another save has written to {path} at the same time, and what is there is its.\n"
            "  Let one group save to a path, or give each a path of its own."
        )


def put_in_place(path: Path, own: Claim) -> None:
    """Let what was written be the checkpoint at ``path``."""
    with claim.alone_in(path.parent):
        with _explained("write", path, _BEFORE):
            check_own(path, own.token)
            _sync(unfinished(path))
            if is_checkpoint(path):
                path.rename(replaced(path))
            try:
                unfinished(path).rename(path)
            except OSError:
                with contextlib.suppress(OSError):  # load finds it there, too
                    replaced(path).rename(path)
                raise
        with _explained("write", path.parent, _PLACED):
            _sync(path.parent)
        with _explained("remove", replaced(path), _PLACED + " Remove that by hand."):
            (path / own.token).unlink()
            if replaced(path).exists():
                shutil.rmtree(replaced(path))


def discard(path: Path, own: Claim) -> None:
    """Remove what was written and not put in place, if it is one's own."""
    if (unfinished(path) / own.token).exists():
        shutil.rmtree(unfinished(path))


def find(path: Path) -> Path:
    """The folder to read.

    Raises:
        InvalidArgumentError: there is no checkpoint.
    """
    with _explained("read", path):
        if is_checkpoint(path):
            return path
        if not path.exists() and is_checkpoint(replaced(path)):
            return replaced(path)
        if path.is_dir():
            problem = f"{path} is a folder without {METADATA}, no checkpoint"
        elif path.exists():
            problem = f"{path} is a file, and a checkpoint is a folder"
        else:
            problem = f"there is no {path}"
        if unfinished(path).exists():
            problem += f".\n  {unfinished(path)} is what a save left that did not complete"
        raise InvalidArgumentError(problem + ".\n  Pass the path that save() was given.")


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether ``load`` would find a checkpoint there, on this host; also after any crash."""
    place = Path(os.path.realpath(absolute(path)))
    return is_checkpoint(place) or (not place.exists() and is_checkpoint(replaced(place)))


def is_checkpoint(path: Path) -> bool:
    """Whether a whole checkpoint is there."""
    return (path / METADATA).is_file()


def reading(path: Path, action: Callable[[], T]) -> T:
    """What ``action``, which reads ``path``, returns; with errors that say what to do.

    Raises:
        InvalidArgumentError: it raised anything else.
    """
    with _explained("read", path):
        return action()


def writing(path: Path, action: Callable[[], T]) -> T:
    """Likewise, for what writes ``path``."""
    with _explained("write", path, _BEFORE):
        return action()


class _explained:  # noqa: N801  # reads like contextlib's
    """Turns what goes wrong with a disk into an error that names path and remedy.

    Args:
        consequence: what is there now.
    """

    def __init__(self, verb: str, path: Path, consequence: str = "") -> None:
        self._verb = verb
        self._path = path
        self._consequence = consequence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, InvalidArgumentError):
            return
        path: object = self._path
        reason = reason_of(error)
        of_disk = disk_error(error)
        if of_disk is not None:
            path, reason = of_disk.filename or path, of_disk.strerror or reason
        advice = " ".join(text for text in (_remedy(self._verb, error), self._consequence) if text)
        raise InvalidArgumentError(
            f"cannot {self._verb} {path} on {host()}: {reason.rstrip('. ')}."
            + (f"\n  {advice}" if advice else "")
        ) from error


def _remedy(verb: str, error: BaseException) -> str:
    """What to do about it, if that can be told."""
    of_disk = disk_error(error)
    number = of_disk and of_disk.errno
    elsewhere = ", or save to another path" if verb == "write" else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"Make room there{elsewhere}."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"See to permissions there{elsewhere}."
    if verb != "read":
        return ""
    if refused_type(error):
        return (
            "If you trust it, allow that type with torch.serialization.add_safe_globals() here, as "
            "where it was saved."
        )
    return "Take another checkpoint, if it is damaged or not all there."


def _refuse_other(place: Path) -> None:
    """Refuse to replace what pycomm has not written."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise InvalidArgumentError(f"{place} is no folder.\n  Save to another path.")
    foreign = sorted(name for name in os.listdir(place) if not _is_ours(name))
    if foreign:
        raise InvalidArgumentError(
            f"{place} would be replaced, and holds {listed(foreign)} beside or instead of a "
            "checkpoint.\n  Save to another path, or move that away."
        )


def _is_ours(name: str) -> bool:
    return name.endswith(".distcp") or name.startswith(
        (METADATA, checksums.NAME, claim.PREFIX, ".nfs")
    )


def _sync(folder: Path) -> None:
    """Let names survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
