"""Faults between hosts: pretended ones everywhere, real cables where namespaces can be made.

The C++ tests (test_switchboard.cpp, test_fault.cpp) have all cases; these are the processes, MPI
and cables that those do without. docs/errors.md has times, which `make fault-table` measures.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from cluster import Cluster, what_is_missing
from launchers import ULFM_BETWEEN_HOSTS, mpirun_command, process_options

from pycomm.connection import read_settings
from pycomm.errors import InvalidArgumentError

PROGRAM = Path(__file__).with_name("host_faults_program.py")
HOST_TIMEOUT_S = 6.0  # four ranks share two busy cores with whatever else tests
FAULTS = ["give_up", "circle", "absent", "stop", "stop_and_receive"]


def noted(folder: Path, fault: str, ranks: Iterable[int]) -> list[dict[str, str]]:
    """What the ranks have noted, with ``after``: the seconds since the fault."""
    found = [json.loads((folder / f"{fault}.{rank}").read_text()) for rank in ranks]
    began = float((folder / f"{fault}.began").read_text())
    for rank, one in zip(ranks, found, strict=True):
        one["after"] = f"{float(one['at']) - began:.2f}"
        print(f"{fault}, rank {rank}: {one['error']} after {one['after']} s: {one['text'][:200]}")
    return found


def assert_all_found(folder: Path) -> None:
    for one in noted(folder, "give_up", [1, 2, 3]):
        assert one["error"] == "PeerLostError"
        assert one["text"] == "rank 0 has had enough"
    for one in noted(folder, "circle", range(4)):
        assert one["error"] == "MismatchError"
        assert "ranks wait for each other in a circle" in one["text"]
        assert "for rank 2" in one["text"] or "for rank 3" in one["text"]
    for one in noted(folder, "absent", range(4)):
        assert one["error"] == "MismatchError"
        assert "root 0" in one["text"] and "root 1" in one["text"]
    for fault in ("stop", "stop_and_receive"):
        for one in noted(folder, fault, range(3)):
            assert one["error"] == "CommTimeoutError"
            assert "The process of rank 3 does not run, while its host does" in one["text"]


def environment() -> dict[str, str]:
    return {"PYCOMM_HOST_TIMEOUT_S": str(HOST_TIMEOUT_S)}


@pytest.mark.timeout(150)
def test_pretended_hosts(tmp_path: Path) -> None:
    done = subprocess.run(
        [*mpirun_command(4), sys.executable, str(PROGRAM), str(tmp_path), *FAULTS],
        capture_output=True,
        timeout=140,
        **process_options(PYCOMM_HOSTS="0,0,1,1", **environment()),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert_all_found(tmp_path)


def with_survivors(fault: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Make one fault under a launcher that leaves other ranks alone."""
    command = mpirun_command(4)
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    if not version.startswith("mpirun (Open MPI) 5"):
        pytest.skip("needs the ULFM of Open MPI 5: any other mpirun ends the survivors")
    program = [sys.executable, str(PROGRAM), str(folder), fault]
    return subprocess.run(
        [command[0], *ULFM_BETWEEN_HOSTS, *command[1:], *program],
        capture_output=True,
        timeout=140,
        **process_options(PYCOMM_HOSTS="0,0,1,1", **environment()),
    )


@pytest.mark.timeout(150)
def test_who_computes_on_another_host_hears_of_a_loss_before_it_is_ended(tmp_path: Path) -> None:
    done = with_survivors("kill_uncaught", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (tmp_path / "kill_uncaught.1").exists(), done.stdout + done.stderr
    [late] = noted(tmp_path, "kill_uncaught", [1])
    assert late["error"] == "PeerLostError"
    assert "rank 3" in late["text"]


@pytest.mark.timeout(150)
def test_word_of_a_killed_process_reaches_the_other_host(tmp_path: Path) -> None:
    done = with_survivors("kill", tmp_path)
    survivors = [rank for rank in range(3) if (tmp_path / f"kill.{rank}").exists()]
    assert survivors == [0, 1, 2], done.stdout + done.stderr
    for one in noted(tmp_path, "kill", survivors):
        assert one["error"] == "PeerLostError"
        assert "rank 3" in one["text"] or "peer is gone" in one["text"]
        assert one["lost"] == "3"


@pytest.fixture(scope="module")
def cluster_can_be_made() -> None:
    missing = what_is_missing()
    if missing is not None:
        pytest.skip(missing)


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("cluster_can_be_made")
def test_a_cut_cable(tmp_path: Path) -> None:
    with Cluster([2, 2]) as cluster:
        command = [sys.executable, str(PROGRAM), str(tmp_path), "cut"]
        with subprocess.Popen(
            [*cluster.mpirun_command(), *command],
            env={**cluster.environment(), **environment()},
            cwd=Path(__file__).parent,
            stdin=subprocess.DEVNULL,
            stdout=(tmp_path / "out").open("w"),
            stderr=subprocess.STDOUT,
        ) as running:
            try:
                wait_for(tmp_path, [f"cut.{rank}.ready" for rank in range(4)], 120)
                (tmp_path / "cut.began").write_text(str(time.time()))
                cluster.cut(1)
                wait_for(tmp_path, [f"cut.{rank}" for rank in range(4)], 60)
            finally:
                running.kill()  # it waits for its daemon on the other host
    for rank, one in enumerate(noted(tmp_path, "cut", range(4))):
        assert one["error"] == "PeerLostError"
        other, others = ("host1", "2, 3") if rank < 2 else ("host0", "0, 1")
        assert "all_reduce of 1 float32" in one["text"]
        assert f"no answer from host '{other}' (ranks {others})" in one["text"]
        assert "it is down, frozen, or the network between is cut" in one["text"]
        assert one["lost"] == others


def wait_for(folder: Path, names: list[str], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while missing := [name for name in names if not (folder / name).exists()]:
        assert time.monotonic() < deadline, f"{missing}: {(folder / 'out').read_text()}"
        time.sleep(0.05)


@pytest.mark.parametrize("text", ["", "ten", "0", "0.5", "nan", "inf", "-1"])
def test_a_time_out_that_makes_no_sense(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="PYCOMM_HOST_TIMEOUT_S"):
        read_settings(None, {"PYCOMM_HOST_TIMEOUT_S": text})


def test_its_default_and_its_unit() -> None:
    assert read_settings(None, {}).host_timeout_s == 10
    assert read_settings(None, {"PYCOMM_HOST_TIMEOUT_S": "2.5"}).host_timeout_s == 2.5
