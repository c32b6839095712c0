"""The rank processes of one contender, which sleep until it is their turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from pycomm.errors import CommError, InvalidArgumentError

START_S = 120.0
TURN_S = 300.0

_RANK_BYTES = 150 << 20  # of a process that has loaded torch and shares its libraries
_BUFFERS = 3  # of the largest size, about what a rank holds


def check_memory(ranks: int, *, contenders: int = 1, largest: int = 0) -> None:
    """Refuse what would bring the machine to its knees before the first rank fails.

    Args:
        largest: the largest message, in bytes.

    Raises:
        InvalidArgumentError: the ranks of all contenders, which live at once, need more memory than
            is available.
    """
    needed = ranks * contenders * (_RANK_BYTES + _BUFFERS * largest)
    available = _available_bytes()
    if needed > available:
        raise InvalidArgumentError(
            f"bench: {contenders} x {ranks} processes with messages of {largest} bytes need about "
            f"{needed / (1 << 30):.3g} GiB of memory, and this machine has "
            f"{available / (1 << 30):.3g} GiB to give. Pass fewer --ranks or --peers or smaller "
            "--sizes; for more ranks, run the command under mpirun on several hosts."
        )


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise CommError("bench: /proc/meminfo has no MemAvailable; Linux since 3.14 has it.")


class Team:
    """Started ranks and a socket to each. As a context manager it ends them, whatever happened."""

    def __init__(
        self, label: str, commands: Sequence[tuple[list[str], dict[str, str]]], ranks: int
    ) -> None:
        self.label = label
        self._folder = tempfile.mkdtemp(prefix="pycomm-bench-")
        self._errors = open(Path(self._folder) / "stderr", "w+")  # noqa: SIM115 - closed in close()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: dict[int, socket.socket] = {}
        self._streams: dict[int, IO[str]] = {}
        self.hello: dict[str, Any] = {}
        try:
            self._start(commands, ranks)
        except BaseException:
            self.close()
            raise

    def _start(self, commands: Sequence[tuple[list[str], dict[str, str]]], ranks: int) -> None:
        address = str(Path(self._folder) / "turns")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(ranks)
            listener.settimeout(0.2)
            for command, environ in commands:
                self._processes.append(
                    subprocess.Popen(
                        [*command, address],
                        env=environ,
                        stdin=subprocess.DEVNULL,
                        stdout=self._errors,
                        stderr=self._errors,
                        start_new_session=True,  # Ctrl-C is ours; close() ends all of them
                    )
                )
            deadline = time.monotonic() + START_S
            while len(self._streams) < ranks:
                self._check(deadline, "start")
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    connection.setblocking(True)
                    stream = connection.makefile("rw")
                    hello = json.loads(stream.readline())
                    self._sockets[hello["rank"]] = connection
                    self._streams[hello["rank"]] = stream
                    if hello["rank"] == 0:
                        self.hello = hello

    def turn(self, **request: Any) -> list[Any]:
        """Ask every rank for the same; their answers by rank.

        Raises:
            CommError: a rank failed, died or does not answer; with what it printed.
        """
        deadline = time.monotonic() + TURN_S
        for stream in self._streams.values():
            with contextlib.suppress(BrokenPipeError):
                stream.write(json.dumps(request) + "\n")
                stream.flush()
        answers: dict[int, Any] = {}
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._sockets.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(answers) < len(self._streams):
                self._check(deadline, f"answer to {request}")
                for key, _ in selector.select(0.2):
                    line = self._streams[key.data].readline()
                    if not line:
                        raise CommError(f"{self.label}: rank {key.data} died.\n{self._printed()}")
                    answer = json.loads(line)
                    if "error" in answer:
                        raise CommError(f"{self.label}: rank {key.data} failed.\n{answer['error']}")
                    answers[key.data] = answer["result"]
                    selector.unregister(self._sockets[key.data])
        return [answers[rank] for rank in sorted(answers)]

    def _check(self, deadline: float, what: str) -> None:
        for process in self._processes:
            if process.poll() is not None:
                raise CommError(
                    f"{self.label}: its ranks ended with status {process.returncode}.\n"
                    + self._printed()
                )
        if time.monotonic() > deadline:
            raise CommError(f"{self.label}: timeout, no {what}.\n{self._printed()}")

    def _printed(self) -> str:
        self._errors.flush()
        self._errors.seek(0)
        return "".join("  " + line for line in self._errors.readlines()[-15:])

    def close(self) -> None:
        """Hang up, wait a moment for the ranks to end by themselves, then end them."""
        for rank, stream in self._streams.items():
            with contextlib.suppress(OSError):
                stream.close()
            self._sockets[rank].close()
        deadline = time.monotonic() + 10.0
        for process in self._processes:
            if self._streams:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(5.0)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        self._errors.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
