"""CRC-32s of the blocks of a checkpoint's files, in a file of their own beside ``.metadata``.

By blocks, so that a rank verifies little more than what it reads. Torch's tools do not look at it.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pycomm.checkpoint.host import host
from pycomm.errors import InvalidArgumentError

NAME = ".checksums"
BLOCK_BYTES = 1 << 20


class Checksums:
    """Those of the files in a folder.

    Args:
        of_files: of each block, by the file's name.
    """

    def __init__(
        self, folder: Path, of_files: Mapping[str, Sequence[int]], block_bytes: int = BLOCK_BYTES
    ) -> None:
        self._folder = folder
        self._of_files = of_files
        self._block_bytes = block_bytes
        self._verified: set[tuple[str, int]] = set()

    @staticmethod
    def parsed(folder: Path, payload: bytes) -> Checksums:
        """What ``write`` wrote; raises whatever comes of a damaged one."""
        found = json.loads(payload)
        return Checksums(folder, dict(found["crc32"]), int(found["block_bytes"]))

    def write(self) -> None:
        """Add the file to the folder, and see it on the disk."""
        with (self._folder / NAME).open("w") as file:
            json.dump({"block_bytes": self._block_bytes, "crc32": self._of_files}, file)
            file.flush()
            os.fsync(file.fileno())

    def verify(self, name: str, ranges: Iterable[tuple[int, int]] | None = None) -> None:
        """Compare the blocks that hold the ``ranges`` of bytes of a file, or all of it.

        Raises:
            InvalidArgumentError: they are not what was written.

        Cost: reads them, which leaves them in the system's cache for who reads them next.
        """
        file, size = self._folder / name, self._block_bytes
        known = self._of_files.get(name, ())
        numbers = set(range(len(known)))
        if ranges is not None:
            numbers = {n for begin, end in ranges for n in range(begin // size, -(-end // size))}
        numbers = {number for number in numbers if (name, number) not in self._verified}
        for number, crc in blocks(file, sorted(numbers), size):
            if number >= len(known) or crc != known[number]:
                raise InvalidArgumentError(
                    f"{file} on {host()} is damaged: something in its bytes {number * size} to "
                    f"{(number + 1) * size} is not what was written.\n  Take another checkpoint."
                )
        self._verified.update((name, number) for number in numbers)


def of_file(file: Path) -> list[int]:
    """Of all of its blocks."""
    count = -(-file.stat().st_size // BLOCK_BYTES)
    return [crc for _, crc in blocks(file, range(count), BLOCK_BYTES)]


def blocks(file: Path, numbers: Iterable[int], block_bytes: int) -> Iterator[tuple[int, int]]:
    """Numbers of blocks in a file, and their CRCs."""
    buffer = memoryview(bytearray(block_bytes))
    with open(file, "rb", buffering=0) as content:
        for number in numbers:
            content.seek(number * block_bytes)
            filled = 0
            while got := content.readinto(buffer[filled:]):
                filled += got
            yield number, zlib.crc32(buffer[:filled])
