"""What survivors of a lost rank can still do, and everybody after any other error."""

import re

import pytest
from launchers import mpirun_ft

# Rank 1 is killed while the others are in a call, or compute and come to it later.
KILLED = """
    import os, signal, sys, time
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
        if sys.argv[1] == "raise":
            raise
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("end", ["raise", "0"])
def test_three_survivors_of_a_kill_say_so_and_leave(end):
    done = mpirun_ft(4, KILLED, end)
    found = re.findall(r"rank (\d) after ([\d.]+) s: .*rank 1 is gone", done.out)
    assert sorted(rank for rank, _ in found) == ["0", "2", "3"], done.out + done.err
    assert all(float(seconds) < 1 for _, seconds in found)
    # With "0" nobody has ended badly but the rank that is gone, and MPI has finalised or was left.
    assert done.returncode == {"raise": 1, "0": 0}[end]
    if end == "raise":
        assert len(set(re.findall(r"rank (\d) of 4 on .*: Traceback", done.err))) == 1
