"""``run``: train, and go on when ranks are lost or come back."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import torch

from pycomm import _core, failure, runtime, ulfm
from pycomm.collectives import all_reduce_, barrier
from pycomm.elastic import membership, rescaling, values
from pycomm.elastic.copies import Copies, Copy, Mark, latest_in_common
from pycomm.elastic.leaving import START_AGAIN, leave
from pycomm.elastic.membership import Members
from pycomm.elastic.preemption import Preemption
from pycomm.elastic.recruits import Recruits, check_threads, enlist
from pycomm.elastic.rescaling import Rule
from pycomm.elastic.state import RECORD, State
from pycomm.errors import CommError, CommTimeoutError, InvalidArgumentError, PeerLostError
from pycomm.objects import all_gather_object, broadcast_object
from pycomm.structures import broadcast_structure

_NOTHING = -1  # is on disk
_LOST_IN_GROWTH = "ranks were lost while others joined"
_NOTICE_S = 2.0  # for MPI to notice that a process of another host is gone


def run(
    train: Callable[[State], object],
    state: State,
    *,
    rescale: Rule = "keep_global_batch",
    min_ranks: int = 1,
    respawns: int = 0,
) -> None:
    """Call ``train(state)`` until it returns on all ranks, whatever ranks are lost meanwhile.

    It joins the ranks (``pycomm.init()``) if the program has not, and gives all of them the same
    state: what is in ``state.folder``, else rank 0's. When a process is lost, the others go back to
    the last commit, make up a new world (ranks are numbered anew) and call ``train`` again. So what
    belongs to a world is made in ``train``: DistributedOptimizer, groups, loaders.

    An exception of ``train`` itself is not tried again: it ends the job, as always.

    Args:
        train: goes on from ``state`` wherever it is, and calls ``state.commit()`` as it goes.
        state: the same names on every rank.
        rescale: what changes in the training when the number of ranks does, also when a job resumes
            on another number of ranks than it had.
        min_ranks: with fewer the job is not worth going on.
        respawns: how many processes may be started in place of lost ones, in all, whatever becomes
            of them. They run this program from its beginning and join at a commit, where ``train``
            is called again.

    Raises:
        InvalidArgumentError: an argument makes no sense, the state has a schedule that ``rescale``
            does not know, the checkpoint does not fit, or none can be written.
        SystemExit: with ``START_AGAIN``, after SIGUSR1 (see docs/elastic.md).
        PeerLostError, CommTimeoutError: ranks were lost, and those that are left cannot go on.
        ...: what ``train`` raises.

    A job that cannot go on (no ``mpirun --with-ft ulfm``, fewer than ``min_ranks``) ends with
    ``START_AGAIN`` if it has a folder to resume from, else with the error. Ranks that leave the job
    to others, which may be alive where they cannot be reached, end with ``START_AGAIN``.
    """
    if not callable(train):
        raise InvalidArgumentError(f"elastic.run: train is {train!r}. Pass what is to be called.")
    if not isinstance(state, State):
        raise InvalidArgumentError(f"elastic.run: state is {state!r}. Pass a State.")
    rescaling.check(rescale, state.things())
    for name, value, least in (("min_ranks", min_ranks, 1), ("respawns", respawns, 0)):
        if not isinstance(value, int) or value < least:
            raise InvalidArgumentError(f"elastic.run: {name} is {value!r}. Pass at least {least}.")
    preemption = Preemption()
    watched = preemption.watched() if state.folder is not None else contextlib.nullcontext()
    with watched:
        runner = _Run(train, state, rescale, min_ranks, respawns, preemption)
        try:
            state.attach(runner.commit)
            runner.go()
        finally:
            state.attach(None)


class _WorldGrowsError(BaseException):
    """Ends ``train`` at a commit. Not an Exception: nobody's handlers are for it."""


class _Run:
    def __init__(
        self,
        train: Callable[[State], object],
        state: State,
        rescale: Rule,
        min_ranks: int,
        respawns: int,
        preemption: Preemption,
    ) -> None:
        self._train = train
        self._state = state
        self._rescale = rescale
        self._min_ranks = min_ranks
        self._respawns = respawns
        self._preemption = preemption
        self._copies = Copies()
        self._recruits = Recruits()
        self._number = 0  # of the last commit
        # The same on all ranks, recruits too, after _restore().
        self._on_disk = _NOTHING  # the last commit that was written
        self._wanted = 0  # ranks
        self._respawned = 0
        self._has_changed = False  # since train was called last

    def go(self) -> None:
        recruited = enlist()
        if recruited is not None:
            with self._leaving(_LOST_IN_GROWTH):
                membership.form(recruited, self._min_ranks)
        else:
            runtime.init()
            self._wanted = runtime.size()
            if self._wanted < self._min_ranks:
                raise InvalidArgumentError(
                    f"elastic.run: {self._wanted} ranks were started, and min_ranks is "
                    f"{self._min_ranks}.\n  Start as many, or pass a smaller number."
                )
            if self._respawns > 0 and membership.can_go_on():
                check_threads()
        while (change := self._trained()) is not None:
            gc.collect()  # what belongs to the world that is over, in reference cycles
            change()
        self._recruits.dismiss(wait=True)

    def _trained(self) -> Callable[[], None] | None:
        """None when it is done; else how the world changes before it is tried again."""
        try:
            self._restore()
            self._train(self._state)
            return None if self._all_done() else lambda: self._recover(agreed=True)
        except _WorldGrowsError as grows:
            _forget_frames(grows)
            return self._grow
        except Exception as error:
            if not self._can_recover(error):
                raise
            _forget_frames(error)
            return lambda: self._recover(agreed=False)

    # --- commits ----------------------------------------------------------------------------------

    def commit(self) -> None:
        """``State.commit``."""
        preempted, recruits_missing, recruits_failed = self._commit_to_memory(
            self._preemption.requested,
            not self._recruits.are_ready(runtime.rank()),
            self._recruits.problem != "",
        )
        if preempted:
            self._leave_preempted()
        if self._state.folder is not None and self._number % self._state.disk_every == 0:
            self._save()
        if recruits_failed:
            if runtime.rank() == 0:
                problem = self._recruits.problem or "another rank could not start processes"
                _say(f"nobody takes a lost rank's place: {problem}")
            self._recruits.give_up()
        elif not recruits_missing:
            raise _WorldGrowsError
        missing = min(self._wanted - runtime.size(), self._respawns - self._respawned)
        if missing > 0 and self._recruits.count == 0 and membership.can_go_on():
            comm = runtime.met_on()
            assert comm is not None
            self._respawned += missing
            self._recruits.start(comm, missing)

    def _commit_to_memory(self, *flags: bool) -> list[bool]:
        """Returns which of ``flags`` are set on any rank."""
        spare = self._copies.spare()
        taken = values.take(self._state.things(), spare.values if spare is not None else {})
        world = runtime.job()
        assert world is not None
        self._copies.take(Copy(Mark(self._number + 1, world), runtime.size(), taken))
        anybodys = torch.tensor([*flags, True], dtype=torch.uint8)
        all_reduce_(anybodys, _core.ReduceOp.MAX)
        self._copies.confirm()
        self._number += 1
        return [bool(flag) for flag in anybodys[:-1].tolist()]

    def _save(self) -> None:
        if self._on_disk == self._number:
            return
        from pycomm import checkpoint  # torch's part of it takes half a second to import

        assert self._state.folder is not None
        record = {"commit": self._number, "ranks": runtime.size()}
        checkpoint.save(self._state.folder, {**self._state.things(), RECORD: record})
        self._on_disk = self._number

    def _leave_preempted(self) -> NoReturn:
        self._save()
        if runtime.rank() == 0:
            _say(
                f"preempted at commit {self._number}, which is in {self._state.folder}.\n"
                f"  Start the job again to go on from there. Exit code {START_AGAIN}."
            )
        self._recruits.dismiss(wait=False)
        with contextlib.suppress(CommError):  # who is lost now has lost nothing
            runtime.shutdown()
        sys.exit(START_AGAIN)

    # --- the same state on all ranks --------------------------------------------------------------

    def _restore(self) -> None:
        """Everybody goes back to the last commit that all have in common. Collective."""
        size = runtime.size()
        mine = (self._copies.marks(), self._wanted, self._respawned, self._on_disk)
        everyones_marks, wanted, respawned, on_disk = zip(*all_gather_object(mine), strict=True)
        self._wanted, self._respawned = max(wanted), max(respawned)
        # Who was lost in a save left some ranks unsure. Who has just come does not know.
        known = [of for of, marks in zip(on_disk, everyones_marks, strict=True) if marks]
        self._on_disk = min(known, default=_NOTHING)
        mark = latest_in_common(everyones_marks)
        if mark is None:
            copy = self._beginning()
        else:
            holders = [rank for rank, marks in enumerate(everyones_marks) if mark in marks]
            held = self._copies.held(mark)
            if len(holders) < size:
                given = _given(held, holders[0])
                held = held or given
            assert held is not None
            copy = held
        self._copies.settle(copy)
        self._number = copy.mark.number
        self._state.put(copy.values)
        if self._has_changed and runtime.rank() == 0:
            _say(f"{size} go on from commit {self._number}.")
        self._has_changed = False
        rescaling.rescale(self._rescale, self._state, self._state.things(), copy.ranks, size)
        if self._state.folder is not None and self._on_disk == _NOTHING:
            self._save()  # what cannot be saved shows now, not hours later

    def _beginning(self) -> Copy:
        """What is on disk, else what rank 0 has made."""
        folder, things, world = self._state.folder, self._state.things(), runtime.job()
        assert world is not None
        if folder is None or not broadcast_object(_is_checkpoint(folder)):
            if folder is not None and runtime.rank() == 0:
                _say(f"there is no checkpoint in {folder}: starting from the beginning.")
            copy = Copy(Mark(0, world), runtime.size(), {})
            if runtime.rank() == 0:
                copy.values.update(values.take(things, {}))
            return _given(copy, 0)
        from pycomm import checkpoint

        loaded = checkpoint.load(folder, {n: t for n, t in things.items() if values.has_state(t)})
        record = loaded.pop(RECORD, None)
        expected = {name for name, thing in things.items() if not values.has_state(thing)}
        if record is None or loaded.keys() != expected:
            raise InvalidArgumentError(
                f"elastic.run on rank {runtime.rank()}: the checkpoint in {folder} has the values "
                f"{sorted(loaded)}, and state has {sorted(expected)}.\n"
                "  Go on with the State it was written from, or pass another folder."
            )
        for name, value in loaded.items():
            self._state.__dict__[name] = values.placed(value, things[name])
        self._on_disk = record["commit"]
        if runtime.rank() == 0:
            _say(f"going on from commit {self._on_disk} in {folder}.")
        taken = values.take(self._state.things(), {})
        return Copy(Mark(self._on_disk, world), record["ranks"], taken)

    # --- other ranks ------------------------------------------------------------------------------

    def _all_done(self) -> bool:
        """Whether ``train`` has returned on all ranks that are alive, the same on all of them."""
        self._commit_to_memory()  # what was done since the last one is in it, too
        if self._state.folder is not None:
            self._save()
        barrier()
        return not membership.can_go_on() or membership.all_agree(True)

    def _can_recover(self, error: Exception) -> bool:
        """Whether a rank was lost and the others can go on. Ends the job if it is to be resumed."""
        own = _communication_error(error)
        if own is None or failure.is_echo(own) or not runtime.is_initialized():
            return False
        deadline = time.monotonic() + (_NOTICE_S if runtime.host_size() > 1 else 0.0)
        while not (lost := runtime.lost_ranks()):
            if time.monotonic() > deadline:
                return False  # of another cause
            time.sleep(0.01)
        if not membership.can_go_on() and self._state.folder is not None:
            reason = f"{_ranks(lost)} lost, and this launcher has no --with-ft ulfm."
            leave(reason, self._state.folder)
        return membership.can_go_on()

    def _recover(self, agreed: bool) -> None:
        """Go on without the lost ranks.

        Args:
            agreed: whether all have agreed already that it is not done.
        """
        began = time.monotonic()
        lost, size = runtime.lost_ranks(), runtime.size()
        failure.note_loss()
        runtime.withdraw()  # who waits for this rank in a group without the lost one
        self._respawned -= self._recruits.unstarted
        self._recruits.dismiss(wait=False)
        with self._leaving(f"{_ranks(lost)} lost"):
            if not agreed:
                membership.all_agree(False)
            membership.leave_the_lost(self._min_ranks)
        seconds = time.monotonic() - began
        self._say_change(f"{_ranks(lost)} lost of {size}; {runtime.size()} left, {seconds:.2f} s.")

    def _grow(self) -> None:
        """Take the recruits in."""
        count, size = self._recruits.count, runtime.size()
        with self._leaving(_LOST_IN_GROWTH):
            merged = self._merged()
            if merged is not None:
                membership.form(merged, self._min_ranks)
        if merged is None:
            self._recover(agreed=True)
        else:
            self._say_change(f"{count} more for {size} ranks.")

    def _merged(self) -> Members | None:
        """The ranks and the recruits; None on all ranks if that fails on one."""
        if not membership.all_agree(True):
            return None
        merged = self._recruits.merged(runtime.rank())
        if membership.all_agree(merged is not None):
            return merged
        if merged is not None:
            ulfm.revoke(merged.comm)  # for recruits that take themselves for taken in
        return None

    @contextlib.contextmanager
    def _leaving(self, what_happened: str) -> Iterator[None]:
        """Where the ranks cannot go on, end the job: to be started again if it can resume."""
        try:
            yield
        except (membership.TooFewError, CommTimeoutError) as error:
            if self._state.folder is not None or isinstance(error, membership.CutOffError):
                leave(f"{what_happened}: {error}", self._state.folder)
            if isinstance(error, CommTimeoutError):
                raise
            raise PeerLostError(
                f"elastic.run: {what_happened}: {error}\n"
                "  The state has no folder to resume from; pass State(folder=...)."
            ) from None

    def _say_change(self, text: str) -> None:
        self._has_changed = True
        if runtime.rank() == 0:
            _say(text)


def _is_checkpoint(folder: Path) -> bool:
    from pycomm import checkpoint

    return checkpoint.exists(folder)


def _given(copy: Copy | None, root: int) -> Copy:
    """``root``'s, on every rank. Collective."""
    group = runtime.world_group("elastic.run")
    given: Copy = broadcast_structure("elastic.run", lambda: copy, root, group)
    return given


def _communication_error(error: BaseException | None) -> CommError | None:
    """``error``, or what a framework says it was raised from."""
    while error is not None and not isinstance(error, CommError):
        error = error.__cause__
    return error


def _forget_frames(error: BaseException | None) -> None:
    """What local variables of ``train`` keep alive: optimizers with hooks on the parameters."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks))
    if not ranks:
        return "no rank was"
    return f"rank {shown} was" if len(ranks) == 1 else f"ranks {shown} were"


def _say(text: str) -> None:
    print(f"pycomm.elastic: {text}", file=sys.stderr, flush=True)
