"""Processes in place of lost ranks: attempts to start them that fail, or end late."""

# ruff: noqa: N802  # mpi4py's names

import os
import sys
import threading
import types

import pytest

from pycomm import runtime
from pycomm.elastic import State, recruits, running
from pycomm.elastic.recruits import Recruits
from pycomm.errors import CommTimeoutError


class MpiError(Exception):
    """As mpi4py raises."""


class Request:
    def __init__(self, is_done):
        self.is_done = is_done

    def Test(self):
        if isinstance(self.is_done, Exception):
            raise self.is_done
        return self.is_done

    @staticmethod
    def Testall(requests):
        return all(request.Test() for request in requests)


class Intercomm:
    """To processes that were started."""

    def __init__(self, is_ready=True):
        self.is_ready = is_ready
        self.told = []

    def Set_errhandler(self, handler):
        pass

    def Irecv(self, buffer, source, tag):
        return Request(self.is_ready[source] if isinstance(self.is_ready, list) else self.is_ready)

    def Issend(self, buffer, recruit, tag):
        self.told.append((recruit, buffer[0]))
        return Request(True)


class Comm:
    """Of ranks; ``Spawn`` returns when it is let."""

    def __init__(self, outcome, duplicates=True):
        self.outcome = outcome
        self.duplicates = duplicates
        self.may_return = threading.Event()

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 2

    def Set_errhandler(self, handler):
        pass

    def Idup(self):
        return self, Request(self.duplicates)

    def Spawn(self, *arguments, info, **keywords):
        self.info = info
        assert self.may_return.wait(30)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def finish(self):
        """The spawning thread comes to its end."""
        threads = [thread for thread in threading.enumerate() if thread.name == "pycomm recruits"]
        self.may_return.set()
        if len(threads) == 1:
            threads[0].join(30)


@pytest.fixture(autouse=True)
def mpi(monkeypatch):
    fake = types.SimpleNamespace(
        Exception=MpiError,
        Request=Request,
        Info=types.SimpleNamespace(Create=dict),
        BYTE=None,
        ERRORS_RETURN=None,
    )
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=fake))
    monkeypatch.setattr(runtime, "default_timeout_s", lambda: 0.05)
    monkeypatch.setattr(recruits, "_sent", [])
    monkeypatch.setattr(recruits.failure, "bound_end", lambda seconds: None)


def begun(comm, count=1):
    found = Recruits()
    found.start(comm, count)
    return found


def test_they_are_taken_in_when_all_wait():
    comm = Comm(Intercomm())
    found = begun(comm, 2)
    assert (found.count, found.are_ready(0)) == (2, False)
    comm.finish()
    assert found.are_ready(0) and found.are_ready(1)


def test_they_start_where_this_process_started(monkeypatch, tmp_path):
    folder = os.getcwd()
    monkeypatch.chdir(tmp_path)
    comm = Comm(Intercomm())
    begun(comm)
    comm.finish()
    assert comm.info == {"wdir": folder}


def test_a_failure_is_told_once():
    comm = Comm(MpiError("no slots"))
    found = begun(comm)
    comm.finish()
    assert found.problem == "no process could be started: no slots"
    found.give_up()
    assert (found.problem, found.count) == ("", 0)


def test_any_failure_to_start_them_is_told():
    comm = Comm(ValueError("no such info"))
    found = begun(comm)
    comm.finish()
    assert found.problem == "no process could be started: no such info"


def test_those_that_mpi_starts_for_ever_are_given_up(monkeypatch):
    """MPI waits for a process that ended before it was in MPI."""
    comm = Comm(Intercomm())
    found = begun(comm, 2)
    assert not found.are_ready(0)
    monkeypatch.setattr(recruits, "_WAIT_S", -1.0)
    assert not found.are_ready(0)
    assert "did not come within" in found.problem
    found.give_up()
    comm.finish()
    assert comm.outcome.told == [(0, b"away"), (1, b"away")]


def test_a_dismissed_attempt_that_fails_is_not_the_next_ones_failure():
    first, second = Comm(MpiError("a rank was lost")), Comm(Intercomm())
    found = begun(first)
    late = threading.enumerate()[-1]
    found.dismiss(wait=False)
    found.start(second, 1)
    first.may_return.set()
    late.join(30)
    assert (found.problem, found.count) == ("", 1)
    second.finish()
    assert found.are_ready(0)


def test_who_starts_after_they_were_dismissed_is_sent_away():
    comm = Comm(Intercomm())
    found = begun(comm, 2)
    found.dismiss(wait=False)
    assert comm.outcome.told == []
    comm.finish()
    assert comm.outcome.told == [(0, b"away"), (1, b"away")]
    assert not found.are_ready(0) and not found.are_ready(1)


def test_one_that_ends_before_it_joins_is_a_failure():
    comm = Comm(Intercomm(is_ready=MpiError("process failed")))
    found = begun(comm)
    comm.finish()
    assert not found.are_ready(0)
    assert "ended before it joined" in found.problem
    found.give_up()
    assert (found.count, found.problem, comm.outcome.told) == (0, "", [])


def test_mpi_is_not_finalised_once_one_was_given_up(monkeypatch):
    bounds = []
    monkeypatch.setattr(recruits.failure, "bound_end", bounds.append)
    for outcome, bounds_then in ((MpiError("no slots"), []), (Intercomm(), [0])):
        comm = Comm(outcome)
        found = begun(comm)
        comm.finish()
        found.give_up()
        assert bounds == bounds_then


def test_one_that_never_says_that_it_waits_is_a_failure(monkeypatch):
    """Open MPI 5.0.11 tells ranks nothing of a recruit that is killed."""
    comm = Comm(Intercomm(is_ready=False))
    found = begun(comm)
    comm.finish()
    assert not found.are_ready(0)
    assert found.problem == ""
    monkeypatch.setattr(recruits, "_WAIT_S", -1.0)
    assert not found.are_ready(0)
    assert "did not come within" in found.problem
    found.give_up()
    assert comm.outcome.told == []


def test_only_those_that_wait_are_sent_away_when_another_one_does_not_come():
    comm = Comm(Intercomm())
    comm.outcome.is_ready = [True, MpiError("process failed")]
    found = begun(comm, 2)
    comm.finish()
    assert not found.are_ready(0)
    found.give_up()
    assert comm.outcome.told == [(0, b"away")]


@pytest.mark.parametrize("outcome", [Intercomm(), MpiError("a rank was lost")])
@pytest.mark.parametrize("is_late", [True, False])
def test_a_process_that_may_have_been_started_counts(outcome, is_late):
    comm = Comm(outcome)
    found = begun(comm, 2)
    if not is_late:
        comm.finish()
    assert (found.count, found.unstarted) == (2, 0)
    comm.finish()


def test_one_that_mpi_was_not_asked_for_does_not_count():
    found = begun(Comm(Intercomm(), duplicates=MpiError("a rank was lost")), 2)
    assert (found.count, found.unstarted) == (2, 2)


def test_what_counts_stays_counted_in_a_recovery(monkeypatch):
    run = running._Run(print, State(), "none", 1, 3, running.Preemption())
    monkeypatch.setattr(runtime, "size", lambda: 2)
    monkeypatch.setattr(runtime, "rank", lambda: 1)
    monkeypatch.setattr(running.failure, "note_loss", lambda: None)
    monkeypatch.setattr(running.membership, "leave_the_lost", lambda least: None)
    comm = Comm(Intercomm())
    run._respawned = 3
    run._recruits.start(comm, 2)
    run._recover(agreed=True)
    assert run._respawned == 3
    comm.finish()
    run._recruits.start(Comm(Intercomm(), duplicates=MpiError("a rank was lost")), 1)
    run._recover(agreed=True)
    assert run._respawned == 2


def test_ranks_that_do_not_come_to_start_processes():
    with pytest.raises(CommTimeoutError, match=r"rank 0 of 2: not all ranks came to start"):
        begun(Comm(Intercomm(), duplicates=False))
