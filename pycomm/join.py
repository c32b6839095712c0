"""Ranks that run out of batches at different times."""

from __future__ import annotations

import contextlib
import enum
import weakref
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol

import torch

from pycomm import _core
from pycomm.errors import CommError, InvalidArgumentError, MismatchError
from pycomm.objects import all_gather_object, broadcast_object
from pycomm.runtime import group_of
from pycomm.state import broadcast_parameters


class Event(enum.IntEnum):
    """What the ranks are about to do together."""

    FINISHED = 0  # this rank, for good
    BACKWARD = 1  # reduce gradients; the value counts the passes since the last step
    LOSS = 2  # average a closure's loss; the value is the loss's core dtype


class Announcement(NamedTuple):
    """What one rank says at a round: three integers on the wire."""

    event: int
    participant: int = 0
    value: int = 0


class Participant(Protocol):
    """A wrapped optimizer, as a rank without batches sees it."""

    def shadow(self, event: Event, value: int, ranks: int) -> None:
        """Do this rank's part of what active ranks have announced, contributing zeros."""

    def adopt(self, root: int) -> None:
        """Take the parameters and the optimizer state of ``root``."""


class Roster:
    """The wrapped optimizers of one group, in the order of their creation: the same everywhere."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[Participant]] = []
        self._channel: _core.Group | None = None
        self.session: _Session | None = None

    def enrol(self, participant: Participant) -> int:
        self._members.append(weakref.ref(participant))
        return len(self._members) - 1

    def member(self, number: int) -> Participant:
        participant = self._members[number]()
        if participant is None:
            raise CommError(
                f"join: other ranks still train with optimizer {number}, which this rank has "
                "dropped.\n  Keep it until the `with pycomm.join()` block is over."
            )
        return participant

    def members(self) -> dict[int, Participant]:
        """Those this rank still has, by number."""
        numbered = ((number, reference()) for number, reference in enumerate(self._members))
        return {number: member for number, member in numbered if member is not None}

    def channel(self, group: _core.Group) -> _core.Group:
        """A queue of its own for announcements. Made by the first join; collective."""
        if self._channel is None:
            self._channel = group.duplicate()
        return self._channel


_rosters: weakref.WeakKeyDictionary[_core.Group, Roster] = weakref.WeakKeyDictionary()


def roster_of(group: _core.Group) -> Roster:
    return _rosters.setdefault(group, Roster())


class _Session:
    """One ``with pycomm.join()`` block: a sequence of rounds in which every rank speaks."""

    def __init__(self, channel: _core.Group, divide_by_world: bool) -> None:
        self._channel = channel
        self._divide_by_world = divide_by_world
        self.last_active = list(range(channel.size))

    def announce(self, mine: Announcement) -> int:
        """Hear what all ranks do next; return how many of them an average is over."""
        self._hear(mine)
        return self._divisor()

    def shadow(self, roster: Roster) -> None:
        """Take part in what the active ranks do until none is active."""
        while (announced := self._hear(Announcement(Event.FINISHED))) is not None:
            participant = roster.member(announced.participant)
            participant.shadow(Event(announced.event), announced.value, self._divisor())

    def _divisor(self) -> int:
        return self._channel.size if self._divide_by_world else len(self.last_active)

    def _hear(self, mine: Announcement) -> Announcement | None:
        """One round. What the active ranks announce, the same by all; None if there are none."""
        sent = torch.tensor(mine, dtype=torch.int64)
        received = torch.empty(self._channel.size, len(mine), dtype=torch.int64)
        self._channel.all_gather(
            sent.data_ptr(), received.data_ptr(), len(mine), _core.DType.INT64, name="join"
        )
        heard = [Announcement(*row) for row in received.tolist()]
        active = [rank for rank, said in enumerate(heard) if said.event != Event.FINISHED]
        if not active:
            return None
        first = active[0]
        for rank in active:
            if heard[rank] != heard[first]:
                raise MismatchError(
                    f"join: rank {first} announces {_described(heard[first])} and rank {rank} "
                    f"{_described(heard[rank])}.\n  Every rank that has a batch must run the same "
                    "backward passes and steps in the same order."
                )
        self.last_active = active
        return heard[first]


def _described(announced: Announcement) -> str:
    if announced.event == Event.BACKWARD:
        return f"backward {announced.value} of this step of optimizer {announced.participant}"
    return f"step(closure) of optimizer {announced.participant}"


class Stateful(Protocol):
    """A module, a scheduler, a ``GradScaler``, ..."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@contextlib.contextmanager
def join(
    *others: Stateful,
    divide_by: Literal["active", "world"] = "active",
    group: _core.Group | None = None,
) -> Iterator[None]:
    """Let ranks have different numbers of batches.

    ::

        with pycomm.join(model):
            for x, y in loader:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()

    A rank that leaves the block takes part in the others' gradient reductions with zeros until all
    have left it. Then every rank takes the parameters, the optimizer states, and the state of the
    ``others``, from the last active rank (the lowest of those that ran the last backward pass).
    A block left by an exception ends at once.

    Inside, only synchronised backward passes and ``step(closure)`` of wrapped optimizers may
    communicate: other collective calls would wait for the ranks that have finished.

    Args:
        others: what else the last active rank gives to all: modules, for their buffers (batch-norm
            statistics), and whatever else steps with the batches and has ``state_dict()`` and
            ``load_state_dict()``. Name every scheduler and ``GradScaler`` here: their counts
            differ after different numbers of batches, and ranks would drift apart.
        divide_by: an averaged gradient is divided by the number of ranks that still have batches,
            or by the number of all.
        group: the group the optimizers were made for, the world if None; every one of its ranks
            enters the block.

    Raises:
        InvalidArgumentError: ``divide_by`` is neither; or a block for the group is already open.
        MismatchError: active ranks do different things, in every rank.

    Cost: one small all-gather for each synchronised backward pass, before its first bucket.
    """
    group = group_of(group)
    if divide_by not in ("active", "world"):
        raise InvalidArgumentError(
            f"join on rank {group.rank}: divide_by is {divide_by!r}.\n"
            '  Pass "active" (the ranks that still have batches) or "world".'
        )
    roster = roster_of(group)
    if roster.session is not None:
        raise InvalidArgumentError(
            f"join on rank {group.rank}: a join block for this group is already open.\n"
            "  Put all loops over uneven batches in one block."
        )
    if group.size == 1:
        yield
        return
    session = _Session(roster.channel(group), divide_by == "world")
    roster.session = session
    try:
        yield
        session.shadow(roster)
    finally:
        roster.session = None
    root = session.last_active[0]
    # A rank may have dropped an optimizer that another has not collected yet: leave it alone.
    members = roster.members()
    of_ranks = all_gather_object(set(members), group=group)
    for number in sorted(set.intersection(*of_ranks)):
        members[number].adopt(root)
    for other in others:
        if isinstance(other, torch.nn.Module):
            broadcast_parameters(other, root=root, group=group)
        else:
            other.load_state_dict(broadcast_object(other.state_dict(), root, group=group))
