"""What every rank of test_host_faults.py runs: four ranks, two on each of two hosts.

    host_faults_program.py FOLDER FAULT...

Each fault in turn; a rank notes in FOLDER/FAULT.RANK what it raised and when. The last may end
ranks or hosts: then it notes in FOLDER/FAULT.RANK.ready that it may come.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import pycomm
from pycomm.runtime import lost_ranks, world_group

FOLDER = Path(sys.argv[1])


def note(name: str, call: Callable[[], object], *, loses: bool = False) -> None:
    """Make ``call``, and note what it raised, and whom it lost: word of them may come later."""
    try:
        call()
        found = {"error": "nothing was raised", "text": ""}
    except pycomm.CommError as error:
        found = {"error": type(error).__name__, "text": str(error)}
    found["at"] = str(time.time())
    while loses and not lost_ranks():
        time.sleep(0.01)
    found["lost"] = ", ".join(map(str, lost_ranks()))
    path = FOLDER / f"{name}.{pycomm.rank()}"
    path.with_suffix(f".{pycomm.rank()}.part").write_text(json.dumps(found))
    path.with_suffix(f".{pycomm.rank()}.part").rename(path)


def began(name: str) -> None:
    """Whose deed it is tells when."""
    (FOLDER / f"{name}.began").write_text(str(time.time()))


def one(group: pycomm.Group, timeout_s: float | None = None) -> None:
    pycomm.all_reduce_(torch.ones(1), group=group, timeout_s=timeout_s)


def for_ever(group: pycomm.Group) -> None:
    while True:
        one(group)
        time.sleep(0.01)


def give_up() -> None:
    """Rank 0 gives a group up while all others wait in it."""
    group = world_group().duplicate()
    if pycomm.rank() == 0:
        time.sleep(0.5)
        began("give_up")
        group.abort("rank 0 has had enough")
    else:
        note("give_up", lambda: one(group))


def circle() -> None:
    """Ranks 0 and 2, on two hosts, call two groups in opposite order; 1 and 3 wait beside."""
    groups = [world_group().duplicate() for _ in range(2)]
    if pycomm.rank() >= 2:
        groups.reverse()

    def call_both() -> None:
        for group in groups:
            one(group)

    if pycomm.rank() == 0:
        began("circle")
    note("circle", call_both)


def absent() -> None:
    """Ranks 0 and 2 both send as roots, and the others have not come."""
    group = world_group().duplicate()
    if pycomm.rank() == 0:
        began("absent")
    if pycomm.rank() % 2 == 1:
        time.sleep(4)
    note("absent", lambda: pycomm.broadcast(torch.ones(1), pycomm.rank() // 2, group=group))


def stop() -> None:
    """Rank 3 is stopped, and all call for it."""
    with_rank_3_stopped("stop", lambda group: one(group, timeout_s=6))


def stop_and_receive() -> None:
    """Rank 3 is stopped; rank 2 waits for its message, rank 1, elsewhere, for that of rank 2."""
    source = pycomm.rank() + 1
    with_rank_3_stopped(
        "stop_and_receive",
        lambda group: pycomm.recv(torch.empty(1), source, group=group, timeout_s=6),
    )


def with_rank_3_stopped(name: str, call: Callable[[pycomm.Group], object]) -> None:
    """Its neighbour stops it; its host goes on."""
    group = world_group().duplicate()
    pids = pycomm.all_gather_object(os.getpid())
    if pycomm.rank() == 2:
        began(name)
        os.kill(pids[3], signal.SIGSTOP)
    if pycomm.rank() == 3:
        time.sleep(0.2)  # stopped in here, and for the rest of it
    else:
        note(name, lambda: call(group))
    if pycomm.rank() == 2:
        time.sleep(0.5)  # the others' deadlines
        os.kill(pids[3], signal.SIGCONT)
    pycomm.barrier()


def kill() -> None:
    """Rank 3 is killed; rank 2 sees it in shared memory, the other host has to be told."""
    (FOLDER / f"kill.{pycomm.rank()}.ready").touch()
    if pycomm.rank() == 3:
        for _ in range(20):
            one(world_group())
        began("kill")
        os.kill(os.getpid(), signal.SIGKILL)
    note("kill", lambda: for_ever(world_group()), loses=True)
    wait_for_others("kill", 3)


def kill_uncaught() -> None:
    """Rank 3 is killed, and nobody catches that; rank 1, of the other host, still computes."""
    one(world_group())
    if pycomm.rank() == 3:
        began("kill_uncaught")
        os.kill(os.getpid(), signal.SIGKILL)
    if pycomm.rank() == 1:
        time.sleep(1.0)
        note("kill_uncaught", lambda: one(world_group()))
        os._exit(1)
    one(world_group())


def cut() -> None:
    """Somebody pulls the cable between the hosts."""
    one(world_group())
    time.sleep(1.5)  # everybody was heard
    (FOLDER / f"cut.{pycomm.rank()}.ready").touch()
    note("cut", lambda: for_ever(world_group()), loses=True)
    wait_for_others("cut", 4)


def wait_for_others(name: str, ranks: int) -> None:
    """Then leave as after a fault: MPI would wait for who is gone."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if sum((FOLDER / f"{name}.{rank}").exists() for rank in range(4)) == ranks:
            break
        time.sleep(0.05)
    time.sleep(0.3)
    os._exit(0)


def main() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    if "PYCOMM_HOSTS" in os.environ:
        rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
        os.environ["PYCOMM_HOST"] = "host" + os.environ["PYCOMM_HOSTS"].split(",")[rank]
    torch.set_num_threads(1)
    pycomm.init(timeout_s=60)
    for fault in sys.argv[2:]:
        globals()[fault]()
        pycomm.barrier()
    pycomm.shutdown()


if __name__ == "__main__":
    main()
