"""A rank takes turns: it sleeps at a socket until the coordinator asks it for something."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]


def pin(rank: int, size: int) -> None:
    """Keep this thread on a core of its own, if there is one for every rank.

    Threads that the library started before stay free.
    """
    cores = sorted(os.sched_getaffinity(0))  # a launcher may have left this rank fewer
    if size <= len(cores):
        os.sched_setaffinity(0, {cores[rank]})


def serve(address: str, hello: Request, answer: Callable[[Request], Any]) -> None:
    """Introduce this rank, then answer requests until the coordinator hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        stream = connection.makefile("rw")
        _say(stream, hello)
        for line in stream:
            try:
                _say(stream, {"result": answer(json.loads(line))})
            except Exception:
                _say(stream, {"error": traceback.format_exc()})


def _say(stream: Any, message: Request) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
