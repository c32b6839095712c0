"""Whatever ends one rank ends the job: soon, with one traceback, and with nothing left behind."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launchers import (
    alone,
    mpirun,
    mpirun_command,
    mpirun_ft,
    process_options,
    python_command,
    torchrun,
    torchrun_command,
)

from pycomm import _core, failure
from pycomm.errors import PeerLostError

# Rank 1 fails after three all-reduces, while the others wait for it in the fourth.
JOB = """
    import atexit, os, signal, sys, time
    import pycomm, torch

    def fail(how):
        print("failing at", time.time(), flush=True)
        if how == "raise":
            raise ValueError("bad batch")
        if how == "sys.exit(3)":
            sys.exit(3)
        if how == "SystemExit":
            raise SystemExit(3)
        if how == "text":
            sys.exit("no data")
        if how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if how == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "slow handler":
            atexit.register(time.sleep, 60)
            raise ValueError("bad batch")

    how = sys.argv[1]
    atexit.register(lambda: print("handler of rank", rank, flush=True))
    pycomm.init()
    rank = pycomm.rank()
    for step in range(1000):
        if step == 3 and (rank == 1 or how == "everywhere"):
            if how == "everywhere":
                raise ValueError("bad batch")
            if how == "finish":
                break
            fail(how)
        try:
            pycomm.all_reduce_(torch.ones(8))
        except pycomm.CommError as error:
            if how == "raise" and rank == 2:
                raise RuntimeError("step failed") from error  # as frameworks do
            raise
"""


def run(how, launch=mpirun, ranks=2, **environ):
    done = launch(ranks, JOB, how, **environ)
    failed_at = re.search(r"failing at ([\d.]+)", done.out)
    seconds = time.time() - float(failed_at[1]) if failed_at else 0.0
    return done, seconds


def ours(err):
    """What pycomm wrote to stderr: before the launcher's banner."""
    return [line for line in err.splitlines() if re.match(r"rank \d+ of \d+ on ", line)]


def one_failing_rank(err):
    ranks = {re.match(r"rank (\d+) of", line)[1] for line in ours(err)}
    assert len(ranks) == 1, err
    return int(ranks.pop())


@pytest.mark.parametrize("environ", [{}, {"PYCOMM_HOSTS": "a,a,b"}], ids=["1 host", "2 hosts"])
def test_the_first_traceback_is_the_only_one(environ):
    done, seconds = run("raise", ranks=3, **environ)
    assert done.returncode == 1
    assert seconds < 5
    assert one_failing_rank(done.err) == 1
    assert ours(done.err)[-1].endswith(": ValueError: bad batch")
    assert ": Traceback (most recent call last):" in ours(done.err)[0]
    assert "PeerLostError" not in done.err
    assert "step failed" not in done.err
    assert "handler of rank 1" in done.out


def test_under_torchrun():
    done, _ = run("raise", torchrun)
    assert done.returncode != 0
    assert one_failing_rank(done.err) == 1
    assert ours(done.err)[-1].endswith(": ValueError: bad batch")


def test_the_same_error_everywhere_is_printed_once():
    done, _ = run("everywhere")
    assert done.returncode == 1
    one_failing_rank(done.err)
    assert done.err.count("ValueError: bad batch") == 1


def test_exit_code_of_sys_exit():
    done, seconds = run("sys.exit(3)")
    assert done.returncode == 3
    assert seconds < 5
    assert [line.split(": ", 1)[1] for line in ours(done.err)] == ["sys.exit(3)"]
    assert "handler of rank 1" in done.out


@pytest.mark.parametrize("how", ["SystemExit", "finish"])
def test_leaving_while_others_still_call(how):
    done, seconds = run(how)
    assert done.returncode != 0
    assert seconds < 5
    one_failing_rank(done.err)
    assert "MismatchError" in done.err
    assert "rank 1 made shutdown" in done.err


def test_ctrl_c_on_a_rank():
    done, seconds = run("interrupt")
    assert done.returncode == 130
    assert seconds < 5
    assert [line.split(": ", 1)[1] for line in ours(done.err)] == ["interrupted"]
    assert "Traceback" not in done.err


# Rank 1 is interrupted in a call and takes a moment to leave; rank 0 hears of it at once.
INTERRUPTED_IN_A_CALL = """
    import os, signal, sys, threading, time
    import pycomm, torch

    pycomm.init()
    if pycomm.rank() == 1:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        pycomm.recv(torch.empty(1), 1 - pycomm.rank())
    except KeyboardInterrupt:
        time.sleep(0.2)
        if sys.argv[1] == "leave":
            raise
        time.sleep(10)
"""


def test_an_interrupted_rank_is_the_one_to_say_so():
    done = mpirun(2, INTERRUPTED_IN_A_CALL, "leave")
    assert done.returncode == 130
    assert [line.split(": ", 1)[1] for line in ours(done.err)] == ["interrupted"]


def test_an_interrupt_that_was_caught_leaves_no_rank_silent():
    done = mpirun(2, INTERRUPTED_IN_A_CALL, "stay")
    assert done.returncode != 0
    assert one_failing_rank(done.err) == 0
    assert (
        "PeerLostError: rank 1 was interrupted in recv of 1 float32, shape (1,), from rank 0"
        in done.err
    )
    assert "Read that rank's log first" in done.err


@pytest.mark.parametrize("how", ["terminate", "kill"])
def test_a_killed_rank(how):
    done, seconds = run(how)
    assert done.returncode != 0
    assert seconds < 5
    if ours(done.err):  # mpirun may end the survivors before they have noticed
        assert one_failing_rank(done.err) != 1
        assert "PeerLostError" in done.err


def test_exit_handlers_are_bounded():
    done, seconds = run("slow handler")
    assert done.returncode == 1
    assert seconds < 5.5
    assert ours(done.err)[-1].endswith(": ValueError: bad batch")


def test_who_waits_in_mpi_for_a_rank_that_does_not_end_says_so():
    done = mpirun(
        2,
        """
        import pycomm, time
        pycomm.init()
        rank = pycomm.rank()
        pycomm.shutdown()
        time.sleep(3 * rank)
        """,
        PYCOMM_WARN_AFTER_S="1",
    )
    assert done.returncode == 0, done.err
    assert done.err.count("has ended and has waited 1 s in MPI_Finalize") == 1
    assert "rank 0 of 2" in done.err


def test_an_asynchronous_call_that_nobody_waits_for_does_not_fail_in_silence():
    done = mpirun(
        2,
        """
        import pycomm, time, torch
        pycomm.init()
        pycomm.all_reduce(torch.ones(2 + pycomm.rank()), async_op=True)
        time.sleep(1.0)  # it has failed
        """,
    )
    assert done.returncode == 1
    assert "MismatchError: call #1 differs" in done.err


def test_shutdown_raises_only_what_nobody_was_told_of():
    done = mpirun(
        2,
        """
        import pycomm, time, torch
        for tell in (True, False):
            pycomm.init()
            pycomm.all_reduce(torch.ones(2 + pycomm.rank()), async_op=True)
            time.sleep(1.0)
            if tell:
                try:
                    pycomm.barrier()
                except pycomm.MismatchError:
                    pycomm.shutdown()
            else:
                try:
                    pycomm.shutdown()
                except pycomm.MismatchError as error:
                    print("raised", error)
        pycomm.init()
        pycomm.barrier()
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("raised call #1 differs") == 2, done.out + done.err


def test_with_ulfm_nobody_waits_in_mpi_for_ever():
    """Rank 1 hangs after ``shutdown()``: rank 0 has done all, says for what it waits, leaves."""
    done = mpirun_ft(
        2,
        """
        import pycomm, time
        pycomm.init(timeout_s=3)
        rank = pycomm.rank()
        pycomm.shutdown()
        if rank == 1:
            time.sleep(8)
        """,
        PYCOMM_WARN_AFTER_S="1",
    )
    assert done.err.count("rank 0 of 2") == 2, done.err
    assert "has ended and has waited 1 s in MPI_Finalize" in done.err
    assert "has ended, has waited 3 s in MPI_Finalize for another rank, and leaves" in done.err


def test_a_caught_exit_is_none():
    done = mpirun(
        2,
        """
        import sys, pycomm
        pycomm.init()
        try:
            sys.exit(3)
        except SystemExit as caught:
            assert caught.code == 3
        pycomm.barrier()
        """,
    )
    assert done.returncode == 0, done.err


def test_a_failure_before_the_ranks_have_met():
    # MPI has started on both ranks, as where programs import mpi4py themselves: see the next test.
    done = mpirun(
        2,
        """
        from mpi4py import MPI
        import pycomm
        pycomm.init(timeout_s=-1.0 if MPI.COMM_WORLD.Get_rank() == 1 else 50.0)
        """,
    )
    assert done.returncode == 1
    assert ours(done.err)[-1].endswith("Pass one, such as 600.")
    assert one_failing_rank(done.err) == 1


def test_a_failure_before_mpi_has_started():
    # The other rank stays away from MPI meanwhile. One that the launcher ends while it connects to
    # it may leave the launcher of Open MPI 5 hanging or crashed (see docs/errors.md).
    done = mpirun(
        2,
        """
        import os, time, pycomm
        rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
        if rank == "0":
            time.sleep(50)
        pycomm.init(timeout_s=-1.0)
        """,
    )
    assert done.returncode == 1
    assert ours(done.err)[-1].endswith("Pass one, such as 600.")
    assert one_failing_rank(done.err) == 1


WATCHED = """
    import atexit, os, resource, sys, time
    from pycomm import failure

    def abort(reason):
        os.write(1, b"told\\n")
        return True

    def end(how):
        if how == "no descriptor is free":
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            files = []
            while True:
                files.append(open(os.devnull))
        if how == "slow handler":
            atexit.register(time.sleep, 60)
            failure.leave_job(75, "preempted")
        if how == "exit":
            exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt

    if sys.argv[2] == "watched":
        failure.watch(failure.Member(0, 2, "node7", abort))
    else:
        failure.bound_end(0)
    end(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("no descriptor is free", 1, "OSError: [Errno 24] Too many open files"),
        ("slow handler", 75, "preempted"),
        ("exit", 3, "sys.exit(3)"),
        ("interrupt", 130, "interrupted"),
    ],
)
def test_a_watched_rank_tells_and_leaves_with_its_code(how, code, said):
    """For want of a descriptor it was silent, and who was cut off in a handler left with 1."""
    done = alone(WATCHED, how, "watched")
    assert (done.returncode, done.out) == (code, "told\n")
    assert said in ours(done.err)[-1]


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("interrupt", 130), ("return", 0)])
def test_who_leaves_without_mpi_has_the_exit_code_of_python(how, code):
    assert alone(WATCHED, how, "bounded").returncode == code


def test_alone_python_prints_its_own_traceback():
    done = alone("import pycomm; pycomm.init(); raise ValueError('bad batch')")
    assert done.returncode == 1
    assert done.err.startswith("Traceback (most recent call last):")
    assert ours(done.err) == []


ENDLESS = """
    import os, pycomm, torch
    pycomm.init()
    os.write(1, f"pid {os.getpid()}\\n".encode())  # whole, though Python be unbuffered
    while True:
        pycomm.all_reduce_(torch.ones(1 << 20))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("launcher_command", [mpirun_command, torchrun_command])
def test_a_signal_to_the_launcher_leaves_nothing(launcher_command, number):
    shared = Path("/dev/shm")
    before = set(shared.iterdir())
    pids = []
    with subprocess.Popen(
        [*launcher_command(2), *python_command(ENDLESS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **process_options(),
    ) as launcher:
        try:
            while len(pids) < 2:
                line = launcher.stdout.readline()
                assert line, "the launcher ended by itself"
                pids += [int(pid) for pid in re.findall(r"pid (\d+)", line)]
            launcher.send_signal(number)
            launcher.communicate(timeout=20)
        finally:
            launcher.kill()
    assert launcher.returncode != 0
    deadline = time.monotonic() + 5
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(pids) == []
    # The arena has no name, so MPI's own files are all that could be new, and mpirun removes them.
    assert not [path for path in set(shared.iterdir()) - before if "pycomm" in path.name]


def alive(pids):
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def test_an_exception_is_seen_though_torch_distributed_collects_what_hooks_print() -> None:
    script = """
        import os, torch.distributed
        import pycomm
        pycomm.init()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        if pycomm.rank() == 1:
            raise ValueError("bad batch")
        pycomm.barrier()
    """
    done = mpirun(2, script)
    assert done.returncode != 0
    assert ours(done.err)[-1].endswith("ValueError: bad batch"), done.err


def chain(*texts: str) -> BaseException:
    """A PeerLostError for each text, each caused by the next, behind a ValueError."""
    error: BaseException | None = None
    for text in reversed(texts):
        cause, error = error, PeerLostError(text)
        error.__cause__ = cause
    first = ValueError("bad batch")
    first.__cause__ = error
    return first


ENDED = "all_reduce: the job was ended by rank 3 of 4 on host1: ValueError: bad batch"
GONE = "all_reduce: rank 0 is gone"


@pytest.mark.parametrize(
    ("texts", "seconds"), [((), 0.0), ((GONE,), 0.2), ((ENDED,), 0.5), ((GONE, ENDED), 0.5)]
)
def test_who_lost_a_peer_leaves_it_to_others_to_end_the_job(texts, seconds):
    """First to the rank that failed, and to a launcher that is killing one rank after another."""
    assert failure._head_start_s(chain(*texts)) == seconds


def test_connections_are_kept_before_the_launcher_is_told(monkeypatch):
    calls = []
    monkeypatch.setattr(_core, "linger", lambda seconds: calls.append(seconds > 0.5))
    failure.abort_mpi(SimpleNamespace(Abort=calls.append), 3)
    assert calls == [True, 3]
