"""The right to write a folder: a file in it, locked as long as its writer lives.

The locks are those of ``flock(2)``, which end with the process. A file system without them goes
unlocked: of two that write one folder, the first to end is told then.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pycomm.checkpoint.host import host

PREFIX = ".seen-by-all-"


class Claim:
    """That of this process on a folder; other ranks recognise the folder by the token in it."""

    def __init__(self, folder: Path) -> None:
        self.token = PREFIX + uuid.uuid4().hex
        self._file = (folder / self.token).open("w")
        _try_lock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            self._file.write(f"process {os.getpid()} on {host()}")
            self._file.flush()
        except BaseException:  # such as a full disk
            self.release()
            raise

    def release(self) -> None:
        """Let others have the folder."""
        _try_lock(self._file.fileno(), fcntl.LOCK_UN)  # for copies that a fork made as well
        with contextlib.suppress(OSError):  # what could not be written before cannot be now
            self._file.close()


def holder(folder: Path) -> str | None:
    """Who has a claim on a folder now, if anybody has."""
    for place in folder.glob(PREFIX + "*"):
        with contextlib.suppress(FileNotFoundError), place.open("r+") as file:
            if not _try_lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB):
                return file.read() or "another process"
    return None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Nobody else is in here for the same folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _try_lock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, operation: int) -> bool:
    """False if another has the lock; True too where there are no locks."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, EBADF for a folder on NFS, ENOSYS, ...
        return True
    return True
