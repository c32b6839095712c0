"""What SECURITY.md says of sockets, files and pickles; it names the tests of the rest."""

import inspect
import os
import re
import stat
from pathlib import Path

import pytest
from launchers import mpirun

import pycomm
from pycomm.cost import CostModel

ROOT = Path(__file__).parent.parent
OBJECTS = ["broadcast_object", "all_gather_object", "gather_object", "scatter_object"]
MORE_OBJECTS = ["send_object", "recv_object", "broadcast_optimizer_state"]


def test_the_core_makes_no_socket_but_that_of_the_hand_over():
    sources = {path.name: path.read_text() for path in (ROOT / "csrc").rglob("*.cpp")}
    made = {
        (name, family)
        for name, text in sources.items()
        for family in re.findall(r"\bsocket\(\s*(\w+)", text)
    }
    assert {pair for pair in made if pair[1].isupper()} == {("handover.cpp", "AF_UNIX")}
    named = re.compile(r"\b(shm_open|mkstemp|mknod|O_CREAT)\b")
    # What every rank did last is saved upon errors, for its owner (tests/test_trace.py).
    assert [name for name, text in sources.items() if named.search(text)] == ["trace.cpp"]


@pytest.mark.parametrize("name", [*OBJECTS, *MORE_OBJECTS])
def test_what_unpickles_says_whom_it_trusts(name):
    text = " ".join((inspect.getdoc(getattr(pycomm, name)) or "").split())
    assert re.search(r"[Uu]npickling (there )?runs code that the \w+( \w+)? chose", text)
    assert re.search(r"ranks (that )?trust each other", text)


def test_measured_costs_are_for_their_user_alone(tmp_path):
    before = os.umask(0)
    try:
        path = CostModel().save(tmp_path / "cost.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_rank_opens_no_port_and_shares_nameless_private_memory():
    done = mpirun(
        2,
        """
        import fcntl, os, stat
        from mpi4py import MPI  # which listens wherever it likes
        import pycomm, torch

        def sockets():
            inodes = set()
            for name in os.listdir("/proc/self/fd"):
                try:
                    link = os.readlink(f"/proc/self/fd/{name}")
                except FileNotFoundError:
                    continue
                if link.startswith("socket:["):
                    inodes.add(link[8:-1])
            return inodes

        def network(inodes):
            rows = [r.split() for f in ("tcp", "tcp6", "udp", "udp6")
                    for r in open(f"/proc/net/{f}").read().splitlines()[1:]]
            return {row[9] for row in rows} & inodes

        before = network(sockets())
        shm = set(os.listdir("/dev/shm"))
        pycomm.init()
        pycomm.all_reduce(torch.ones(100_000))
        pycomm.new_group([0, 1])
        assert network(sockets()) <= before, "a network socket of pycomm's"
        assert not [name for name in set(os.listdir("/dev/shm")) - shm if "pycomm" in name]
        memories = [fd for fd in os.listdir("/proc/self/fd")
                    if os.path.realpath(f"/proc/self/fd/{fd}") == "/memfd:pycomm (deleted)"]
        assert len(memories) == 2, memories  # this rank's and the other's
        for fd in map(int, memories):
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o600
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            assert seals & fcntl.F_SEAL_SHRINK and seals & fcntl.F_SEAL_SEAL
            assert not os.get_inheritable(fd)
        pycomm.shutdown()
        print("private")
        """,
    )
    assert done.returncode == 0, done.err
    assert done.out.count("private") == 2
