"""What survivors of a lost rank can still do, and everybody after any other error."""

import pickle
import re

import pytest
from launchers import mpirun, mpirun_ft

from pycomm import errors

# Rank 1 is killed while the others are in a call, or compute and come to it later.
KILLED = """
    import os, signal, time
    import pycomm, torch

    assert signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN  # a survivor may write to the dead
    pycomm.init()
    rank = pycomm.rank()
    pycomm.barrier()
    if rank == 1:
        print("killed at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        time.sleep(0.5)
    called = time.time()
    try:
        pycomm.all_reduce_(torch.ones(8))
    except pycomm.PeerLostError as error:
        seconds = time.time() - called
        print(f"pid {os.getpid()}: rank {rank} after {seconds:.3f} s: {error}", flush=True)
        raise
"""


def test_three_survivors_of_a_kill_say_so_and_leave():
    done = mpirun_ft(4, KILLED)
    found = re.findall(r"rank (\d) after ([\d.]+) s: .*rank 1 is gone", done.out)
    assert sorted(rank for rank, _ in found) == ["0", "2", "3"], done.out + done.err
    assert all(float(seconds) < 1 for _, seconds in found)
    assert done.returncode == 1
    assert len(set(re.findall(r"rank (\d) of 4 on .*: Traceback", done.err))) == 1


@pytest.mark.parametrize(
    ("error", "usable"),
    [
        (errors.CommError("no"), True),
        (errors.InvalidArgumentError("no"), True),
        (errors.NotInitializedError("no"), True),
        (errors.MismatchError("no"), False),
        (errors.MismatchError("no", group_usable=True), True),
        (errors.CommTimeoutError("no"), False),
        (errors.PeerLostError("no"), False),
        (errors.StageError("no"), False),
    ],
)
def test_an_error_says_whether_its_group_is_usable(error, usable):
    copy = pickle.loads(pickle.dumps(error))
    assert (error.group_usable, copy.group_usable, str(copy)) == (usable, usable, "no")


# Each turn makes one error on both ranks. Afterwards the group goes on if the error said so, else
# it raises again; and in either case init() after shutdown() begins anew.
START_OVER = """
    import os, signal, threading, time
    import pycomm, torch

    def mismatch(rank):
        pycomm.all_reduce(torch.ones(3 + rank))

    def compared_first(rank):
        pycomm.broadcast_parameters({"w": torch.ones(3 + rank)})

    def timeout(rank):
        if rank == 1:
            time.sleep(0.5)
        pycomm.barrier(timeout_s=0.2)

    def interrupt(rank):
        if rank == 1:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            pycomm.recv(torch.empty(1), 1 - rank)
        except KeyboardInterrupt:
            time.sleep(0.2)
            pycomm.barrier()

    def invalid(rank):
        pycomm.all_reduce(torch.ones(3), "SUM")

    for fail in (mismatch, compared_first, timeout, interrupt, invalid):
        pycomm.init()
        rank = pycomm.rank()
        pycomm.barrier()
        try:
            fail(rank)
        except pycomm.CommError as error:
            print(rank, fail.__name__, type(error).__name__, error.group_usable, flush=True)
            usable = error.group_usable
        try:
            pycomm.barrier()
            assert usable
        except pycomm.CommError:
            assert not usable
        pycomm.shutdown()
"""


def test_starting_over_after_every_error():
    done = mpirun(2, START_OVER)
    assert done.returncode == 0, done.out + done.err
    for rank in range(2):
        for line in (
            "mismatch MismatchError False",
            "compared_first MismatchError True",
            "timeout CommTimeoutError False",
            "interrupt PeerLostError False",
            "invalid InvalidArgumentError True",
        ):
            assert f"{rank} {line}" in done.out


# Two ranks are killed, one after the other; the second was rank 0 of those left. Rank 1 waits for
# rank 0 in a group without the first one, and hears that it does not come.
SHRINK = """
    import os, signal
    from mpi4py import MPI
    import pycomm, torch

    comm = MPI.COMM_WORLD
    for victim in (2, 0, None):
        pycomm.init(comm=comm)
        try:
            pair = pycomm.new_group([0, 1])  # others may still be in it when the victim is killed
            if pycomm.rank() == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            if victim == 2 and pycomm.rank() == 1:
                try:
                    pycomm.barrier(group=pair)
                except pycomm.MismatchError as error:
                    assert "rank 0 called shutdown() instead" in str(error)
                    assert pycomm.runtime.lost_ranks() == [2]
            total = pycomm.all_reduce(torch.tensor([pycomm.size()]))
            assert victim is None
        except pycomm.PeerLostError as error:
            assert not error.group_usable
            pycomm.runtime.withdraw()
            comm.Revoke()
            comm = comm.Shrink()
            pycomm.shutdown()
    print(f"rank {pycomm.rank()} has {total.tolist()}", flush=True)
"""


def test_starting_over_on_the_shrunk_communicator():
    done = mpirun_ft(4, SHRINK)
    assert done.returncode == 0, done.out + done.err
    assert sorted(re.findall(r"rank . has .*", done.out)) == ["rank 0 has [4]", "rank 1 has [4]"]


# Rank 1 ends before it has started MPI, which this launcher does not take for the end of the job.
EARLY = """
    import os, sys
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        sys.exit(3)
    import pycomm
    pycomm.init(timeout_s=5)
"""


def test_who_never_starts_mpi_is_not_awaited_for_ever():
    done = mpirun_ft(3, EARLY)
    assert done.returncode != 0
    # The launcher may end the other one when the first has left.
    assert re.search(r"init on rank [02]: MPI did not start within 5 s", done.err)
