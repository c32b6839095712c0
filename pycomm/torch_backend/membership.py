"""How the ranks of a torch process group become a group of the core.

Torch gives every group a store, through which its members, and nobody else, tell each other who
they are. What is made of it depends on what there is:

- The default group, and no rank has joined a job: the ranks join one, as ``pycomm.init`` would have
  done, and the group is its world. Whatever pycomm offers can be used beside torch's calls, and
  ``destroy_process_group`` leaves the job.
- All members are ranks of one job: a group in it, with a queue and memory of its own.
- A group of pycomm in a world of another backend: its members join a job of their own.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from pycomm import failure, runtime
from pycomm._core import Group, World
from pycomm.connection import connect, host_key, read_settings
from pycomm.errors import CommTimeoutError, InvalidArgumentError, MismatchError
from pycomm.launch import Meeting, detect
from pycomm.rendezvous import Rendezvous, StoreGather, mpi_comm


@dataclasses.dataclass(frozen=True)
class Membership:
    """A rank's place in a core group; ``leave`` ends it, together with the other members."""

    group: Group
    leave: Callable[[], None]


# Of each rank of torch's world, its rank in the job; empty where the two have nothing in common.
_job_ranks: list[int] = []


def join(
    store: Any, rank: int, size: int, timeout_s: float, torch_ranks: Sequence[int]
) -> Membership:
    """Become a member. Collective over the ``size`` ranks that share ``store``.

    Args:
        torch_ranks: theirs in torch's world.

    Raises:
        CommTimeoutError: not all came. MismatchError: only some of them are ranks of a job.
        InvalidArgumentError, CommError: as ``pycomm.init``.
    """
    call = "new_group" if dist.is_initialized() else "init_process_group"
    in_job = _ranks_in_job(torch_ranks)

    def check(missing: list[int]) -> None:
        if in_job:
            runtime.check_present([in_job[other] for other in missing], call)

    gather = StoreGather(
        dist.PrefixStore("pycomm", store), rank, size, timeout_s, call=call, check=check
    )
    mine = {
        "job": runtime.job(),
        "rank": runtime.rank() if runtime.is_initialized() else None,
        "host": host_key(os.environ),
        "mpi_rank": _mpi_rank(),
    }
    cards = [json.loads(card) for card in gather(json.dumps(mine).encode())]
    jobs = {card["job"] for card in cards}
    if len(jobs) > 1:
        raise MismatchError(_mixed_jobs(rank, cards))
    if jobs != {None}:
        group = runtime.make_group([card["rank"] for card in cards], gather, timeout_s)
        if not dist.is_initialized():
            _job_ranks[:] = [card["rank"] for card in cards]
            return Membership(group, _job_ranks.clear)
        return Membership(group, lambda: None)
    comm = None
    if len({card["host"] for card in cards}) > 1 and all(
        card["mpi_rank"] is not None for card in cards
    ):
        comm = mpi_comm([card["mpi_rank"] for card in cards])
    meeting = Rendezvous(rank, size, gather, comm)
    if not dist.is_initialized():
        runtime.init_through(meeting, timeout_s=timeout_s)
        _job_ranks[:] = range(size)
        return Membership(runtime.world_group(), _leave_job)
    return _apart(connect(meeting, read_settings(timeout_s, os.environ)).world)


def _leave_job() -> None:
    """Together with the others, if they come within the timeout of a call.

    In torch, a rank that has nothing more to do need not wait for one that has, and a program that
    saves its last checkpoint for long on one rank must not fail for that.
    """
    _job_ranks.clear()
    try:
        runtime.shutdown()
    except CommTimeoutError as late:
        failure.unwatch()
        warnings.warn(
            f"destroy_process_group: left without waiting longer for the others. {late}",
            RuntimeWarning,
            stacklevel=2,
        )


def _ranks_in_job(torch_ranks: Sequence[int]) -> list[int]:
    """Empty if that is not known (yet)."""
    if not dist.is_initialized() or not runtime.is_initialized():
        return []
    if not _job_ranks or not torch_ranks:
        return _job_ranks
    return [_job_ranks[r] for r in torch_ranks]


def _mpi_rank() -> int | None:
    """This process's among those that mpirun started, if it did.

    Torch was told rank and size: the variables for them may be half set, as by torch's own tests.
    """
    try:
        launch = detect(os.environ)
    except InvalidArgumentError:
        return None
    return launch.rank if launch.meeting is Meeting.MPI else None


_worlds: list[World] = []


def _apart(world: World) -> Membership:
    if not _worlds:
        atexit.register(_close_worlds)
        os.register_at_fork(after_in_child=_worlds.clear)
    _worlds.append(world)

    def leave() -> None:
        if world in _worlds:
            _worlds.remove(world)
        world.close()

    return Membership(world.group, leave)


def _close_worlds() -> None:
    while _worlds:
        _worlds.pop().close()


def _mixed_jobs(rank: int, cards: Sequence[dict[str, Any]]) -> str:
    def those(with_job: bool) -> str:
        return ", ".join(
            str(r) for r, card in enumerate(cards) if (card["job"] is None) != with_job
        )

    if all(card["job"] is not None for card in cards):
        return (
            f"init_process_group on rank {rank}: the members of the group have called "
            "pycomm.init() in different jobs.\n  Make torch groups of ranks of one job."
        )
    return (
        f"init_process_group on rank {rank}: rank {those(True)} of the group called pycomm.init() "
        f"before, and rank {those(False)} did not.\n  Call it on all ranks, or on none: "
        'init_process_group("pycomm") does it by itself.'
    )
