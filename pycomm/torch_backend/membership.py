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
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from pycomm import failure, runtime
from pycomm._core import Group, World
from pycomm.connection import connect, host_key, read_card, read_settings
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.launch import Meeting, detect
from pycomm.rendezvous import Rendezvous, StoreGather, mpi_comm

# A rank that is through waits for those that are not as long as they live: torch's programs often
# let rank 0 evaluate or save for hours when the others are done.
_LEAVE_TIMEOUT_S = 30 * 86400.0


# What a rank says of itself in the store: the types of its fields.
_CARD: dict[str, type | tuple[type, ...]] = {
    "size": int,
    "job": (str, type(None)),
    "rank": (int, type(None)),
    "host": str,
    "mpi_rank": (int, type(None)),
}


@dataclasses.dataclass(frozen=True)
class Membership:
    """A rank's place in a core group; ``leave`` ends it, together with the other members.

    ``check_present`` raises what ends a call, of that name, if one of these members, on this host,
    is gone or leaves the job.

    ``store`` is torch's, without anything in it. Torch gives a new group the name of one that was
    destroyed, and the store of torchrun's agent remembers that one's keys.
    """

    group: Group
    leave: Callable[[], None]
    store: Any
    check_present: Callable[[Sequence[int], str], None]


# How many default groups met before the present one in its store, whose other groups share it.
_life = 0


# Of each rank of torch's world, its rank in the job; empty where the two have nothing in common.
_job_ranks: list[int] = []


def join(
    store: Any, rank: int, size: int, timeout_s: float, torch_ranks: Sequence[int] = ()
) -> Membership:
    """Become a member. Collective over the ``size`` ranks that share ``store``.

    Args:
        torch_ranks: theirs in torch's world; all of it if empty.

    Raises:
        CommTimeoutError: not all came. MismatchError: they disagree about ``size``, or only some
            of them are ranks of a job.
        InvalidArgumentError: ``rank`` is none of ``size``; and CommError: as ``pycomm.init``.
    """
    if not 0 <= rank < size:
        raise InvalidArgumentError(
            f"init_process_group: rank is {rank}, and world_size {size}.\n"
            f"  Ranks run from 0 to {size - 1}: give each process one of its own, and all the same "
            "world_size."
        )
    global _life
    is_default = not dist.is_initialized()
    call = "init_process_group" if is_default else "new_group"
    place = "pycomm" if is_default else f"pycomm/{_life}"
    in_job = _ranks_in_job(torch_ranks)

    def check(missing: list[int]) -> None:
        if in_job:
            runtime.check_present([in_job[other] for other in missing], call)

    gather = StoreGather(
        dist.PrefixStore(place, store), rank, size, timeout_s, call=call, check=check
    )
    if is_default:
        _life = gather.meeting
    empty = dist.PrefixStore(f"{place}/{gather.meeting}", store)
    mine = {
        "size": size,
        "job": runtime.job(),
        "rank": runtime.rank() if runtime.is_initialized() else None,
        "host": host_key(os.environ),
        "mpi_rank": _mpi_rank(),
    }
    cards = [
        read_card(card, _CARD, f"{call} on rank {rank}", other)
        for other, card in enumerate(gather(json.dumps(mine).encode()))
    ]
    for other, card in enumerate(cards):
        if card["size"] != size:
            raise MismatchError(
                f"{call}: world_size is {size} on rank {rank} and {card['size']} on "
                f"rank {other}.\n  Pass the same everywhere, or WORLD_SIZE to every process."
            )
    jobs = {card["job"] for card in cards}
    if len(jobs) > 1:
        raise MismatchError(_mixed_jobs(rank, cards))
    if jobs != {None}:
        members = [card["rank"] for card in cards]
        group = runtime.make_group(members, gather, timeout_s)
        if not is_default:
            return Membership(group, lambda: None, empty, _check_of(members))
        _job_ranks[:] = members
        return Membership(group, _job_ranks.clear, empty, _check_of(members))
    comm = None
    if len({card["host"] for card in cards}) > 1:
        mpi_ranks = [card["mpi_rank"] for card in cards]
        if None not in mpi_ranks and len(set(mpi_ranks)) == size:  # else a rank spawned processes
            comm = mpi_comm(mpi_ranks)
    meeting = Rendezvous(rank, size, gather, comm)
    if is_default:
        runtime.init_through(meeting, timeout_s=timeout_s, leave_timeout_s=_LEAVE_TIMEOUT_S)
        _job_ranks[:] = range(size)
        return Membership(runtime.world_group(), _leave_job, empty, runtime.check_present)
    world = connect(meeting, read_settings(timeout_s, os.environ)).world
    return Membership(world.group, _apart(world), empty, world.check_present)


def _check_of(members: Sequence[int]) -> Callable[[Sequence[int], str], None]:
    """Members are ranks of the job."""
    return lambda ranks, call: runtime.check_present([members[r] for r in ranks], call)


def _leave_job() -> None:
    _job_ranks.clear()
    runtime.shutdown()


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


def _apart(world: World) -> Callable[[], None]:
    """How to leave a world other than pycomm's own."""
    if not _worlds:
        atexit.register(_close_worlds)
        os.register_at_fork(after_in_child=_worlds.clear)
    _worlds.append(world)

    def leave() -> None:
        if world in _worlds:
            _worlds.remove(world)
        world.close(timeout_s=_LEAVE_TIMEOUT_S, failure=failure.being_handled())

    return leave


def _close_worlds() -> None:
    while _worlds:
        _worlds.pop().close(timeout_s=_LEAVE_TIMEOUT_S)


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
