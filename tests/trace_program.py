"""Ranks for tests of traces and timeouts: each makes two calls, then what its rank says.

mpirun -np 3 python tests/trace_program.py {sleep|stop|differ|message}
"""

import os
import signal
import sys
import time

import torch

import pycomm


def absent() -> None:
    """A loop of the user's that does not end in time."""
    time.sleep(20)


def main(what: str) -> None:
    pycomm.init()
    last = pycomm.size() - 1
    pycomm.all_reduce_(torch.ones(4))
    pycomm.broadcast_(torch.ones(2, 3), root=1)
    print(f"ready: process {os.getpid()}", flush=True)
    if pycomm.rank() != last:
        timeout_s = float(os.environ.get("CALL_TIMEOUT_S", "600"))
        if what == "message":
            pycomm.recv(torch.ones(3), src=last, tag=7, timeout_s=timeout_s)
        else:
            pycomm.all_reduce_(torch.ones(5), op=pycomm.ReduceOp.MAX, timeout_s=timeout_s)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "differ":
        pycomm.all_reduce_(torch.ones(6))
    else:
        absent()


if __name__ == "__main__":
    main(sys.argv[1])
