"""Ranks as threads of this process."""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pycomm import _core

T = TypeVar("T")


class RankError(Exception):
    """What ``run_ranks`` raises; its cause is what the rank raised."""


def run_ranks(
    world_size: int,
    fn: Callable[[_core.Group], T],
    *,
    hosts: Sequence[int] | None = None,
    timeout_s: float = 60.0,
    piece_bytes: int = 512 * 1024,
    gpu_places: _core.GpuPlaces | None = None,
    gpu_transport: _core.GpuTransport = _core.GpuTransport.AUTO,
) -> list[T]:
    """Call ``fn(group)`` on every rank of a loopback world; return the results by rank.

    ``fn`` can also be given the world's group of a real job: a test marked ``mpi`` does that.

    Args:
        hosts: the pretended host of each rank; one host if None.
        timeout_s: after which the stacks of all threads are raised.
        piece_bytes: of staging memory; small ones make small tensors take the way of large ones.
        gpu_places: where CUDA and NCCL, or stand-ins for them, are.
        gpu_transport: what carries calls on GPUs.

    Raises:
        RankError: naming the rank that raised first; the others were then aborted.
        TimeoutError: some rank is still busy.
    """
    hosts = [0] * world_size if hosts is None else list(hosts)
    assert len(hosts) == world_size
    # The group's own deadline must not hide a hang.
    worlds = _core.loopback_worlds(
        hosts,
        timeout_s=2 * timeout_s,
        piece_bytes=piece_bytes,
        gpu_places=gpu_places or _core.GpuPlaces(),
        gpu_transport=gpu_transport,
    )
    results: dict[int, T] = {}
    errors: list[tuple[int, BaseException]] = []  # in the order they were raised

    def run(rank: int) -> None:
        try:
            results[rank] = fn(worlds[rank].group)
            worlds[rank].close()
        except BaseException as error:  # the main thread raises it
            errors.append((rank, error))
            worlds[rank].abort(f"rank {rank} raised {type(error).__name__}: {error}")

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))

    busy = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if busy:
        stacks = _stacks()
        for world in worlds:
            world.abort(f"ranks {busy} did not return within {timeout_s:g} s")
        for thread in threads:
            thread.join(5.0)
    if errors and not (busy and errors[0][0] in busy):
        rank, error = errors[0]
        raise RankError(f"rank {rank} of {world_size}: {type(error).__name__}: {error}") from error
    if busy:
        raise TimeoutError(
            f"ranks {busy} of {world_size} did not return within {timeout_s:g} s.\n{stacks}"
        )
    return [results[rank] for rank in range(world_size)]


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
