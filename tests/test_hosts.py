"""Several hosts: everywhere pretended ones, and real ones as namespaces where they can be made.

Both run the same program, on four ranks and the placements below.
"""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from cluster import Cluster, what_is_missing
from launchers import Result, mpirun, mpirun_command, process_options

PROGRAM = Path(__file__).with_name("hosts_program.py")
TORCH_PROGRAM = Path(__file__).with_name("torch_hosts_program.py")
EVERYTHING = ["collectives", "mismatch", "train", "pipeline"]

# For mpirun: the slots of each host, and how ranks are dealt out to them.
PLACEMENTS = {
    "0,0,1,1": ([2, 2], "slot"),
    "0,1,0,1": ([2, 2], "node"),
    "0,0,0,1": ([3, 1], "slot"),
    "0,1,2,3": ([1, 1, 1, 1], "slot"),
}

needs_cluster = pytest.mark.usefixtures("cluster_can_be_made")


@pytest.fixture(scope="module")
def cluster_can_be_made() -> None:
    missing = what_is_missing()
    if missing is not None:
        pytest.skip(missing)


def program(*placements: str, programs: list[str], runs: Path) -> list[str]:
    options = ["--placements", *placements, "--programs", *programs, "--runs", str(runs)]
    return [sys.executable, str(PROGRAM), *options]


def assert_all_done(done: Result, placements: list[str]) -> None:
    assert done.returncode == 0, done.out + done.err
    for placement in placements:
        for name in EVERYTHING:
            assert f"{name} on {placement}: done" in done.out
    assert done.out.count("largest parameter difference: 0\n") == len(placements), done.out


# The program itself notices a hang, earlier, and shows the stacks of all ranks.
@pytest.mark.timeout(150)
@needs_cluster
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_real_hosts(placement: str, tmp_path: Path) -> None:
    slots, map_by = PLACEMENTS[placement]
    everything = program(placement, programs=EVERYTHING, runs=tmp_path)
    with Cluster(slots) as cluster:
        done = cluster.mpirun(everything, map_by=map_by, timeout_s=140)
    assert_all_done(done, [placement])


@pytest.mark.timeout(600)
def test_pretended_hosts(tmp_path: Path) -> None:
    # One start for all placements: init() after shutdown() reads PYCOMM_HOST again.
    placements = list(PLACEMENTS)
    everything = program(*placements, programs=EVERYTHING, runs=tmp_path)
    done = subprocess.run(
        [*mpirun_command(4), *everything, "--pretend"],
        capture_output=True,
        timeout=580,
        **process_options(),
    )
    assert_all_done(Result(done.returncode, done.stdout, done.stderr), placements)


def torch_program(placement: str, interface: str) -> list[str]:
    return [sys.executable, "-W", "ignore", str(TORCH_PROGRAM), placement, interface]


def assert_torch_done(done: Result) -> None:
    assert done.returncode == 0, done.out + done.err
    assert done.out.split("\n")[:2] == ["pycomm: done", "pycomm in gloo: done"], done.out


@pytest.mark.timeout(150)
@needs_cluster
def test_torch_on_real_hosts() -> None:
    with Cluster([2, 2]) as cluster:
        done = cluster.mpirun(torch_program("0,0,1,1", "eth0"), timeout_s=140)
    assert_torch_done(done)


@pytest.mark.timeout(150)
def test_torch_on_pretended_hosts() -> None:
    program = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = torch_program("0,1,0,1", "")[3:]
    done = mpirun(4, program, *arguments, PYCOMM_HOSTS="0,1,0,1", PYTHONWARNINGS="ignore")
    assert_torch_done(done)


# What torchrun says to each rank, on one of two hosts.
TORCHRUN_ON_TWO_HOSTS = """
import os, sys
os.environ["MASTER_ADDR"] = "10.77.0.1"
os.environ.update(RANK=os.environ["OMPI_COMM_WORLD_RANK"], WORLD_SIZE="2", MASTER_PORT="29500")
os.environ.update(TORCHELASTIC_RUN_ID="0", TORCHELASTIC_USE_AGENT_STORE="False")
import torch.distributed as dist
try:
    dist.init_process_group("pycomm")
except Exception as error:
    print(f"rank {os.environ['RANK']}: {type(error).__name__}: {error}", flush=True)
"""


@needs_cluster
def test_torchrun_on_two_hosts_names_the_remedy() -> None:
    with Cluster([1, 1]) as cluster:
        done = cluster.mpirun([sys.executable, "-c", TORCHRUN_ON_TWO_HOSTS])
    for rank in range(2):
        assert f"rank {rank}: CommError: init" in done.out, done.out + done.err
    assert "the 2 ranks are on 2 hosts, and under torchrun pycomm has no MPI" in done.out
    assert "Start with mpirun" in done.out


@needs_cluster
@pytest.mark.timeout(150)
@pytest.mark.parametrize("slots", [[2, 2], [3, 1]])
def test_an_exception_ends_the_job_on_all_hosts(slots: list[int], tmp_path: Path) -> None:
    placement = next(name for name, (s, how) in PLACEMENTS.items() if s == slots and how == "slot")
    out, err = tmp_path / "out", tmp_path / "err"
    with (
        Cluster(slots) as cluster,
        out.open("w") as to_out,
        err.open("w") as to_err,
        subprocess.Popen(
            [*cluster.mpirun_command(), *program(placement, programs=["fail"], runs=tmp_path)],
            env=cluster.environment(),
            cwd=PROGRAM.parent,
            stdin=subprocess.DEVNULL,
            stdout=to_out,
            stderr=to_err,
        ) as job,
    ):
        try:
            begun = time.monotonic()
            while (line := re.search(r"failing at ([\d.]+)\n", out.read_text())) is None:
                assert time.monotonic() - begun < 100, err.read_text()
                time.sleep(0.05)
            # mpirun does not wait for its daemons, and may wait for ever itself: docs/errors.md.
            while ranks := [one for one in cluster.running() if PROGRAM.name in one]:
                assert time.time() - float(line[1]) < 5, ranks
                time.sleep(0.05)
            try:
                assert job.wait(5) == 1
            except subprocess.TimeoutExpired:
                warnings.warn(f"mpirun hangs, beside {cluster.running()}", stacklevel=1)
        finally:
            job.kill()
    ours = [line for line in err.read_text().splitlines() if re.match(r"rank \d+ of 4 on ", line)]
    assert ours[-1] == "rank 3 of 4 on host1: ValueError: bad batch"
    assert all(line.startswith("rank 3 of 4 on host1: ") for line in ours)


# --- the cluster itself --------------------------------------------------------------------------


@needs_cluster
def test_a_cluster_leaves_nothing_when_its_body_raises() -> None:
    before = interfaces_and_mounts()
    pids: list[int] = []

    def interrupted() -> None:
        with Cluster([1, 1]) as cluster:
            pids.extend(cluster.pids())
            assert all(alive(pid) for pid in pids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 3
    assert [pid for pid in pids if alive(pid)] == []
    assert interfaces_and_mounts() == before


USER = """
import sys
from cluster import Cluster
with Cluster([1, 1]) as cluster:
    print(*cluster.pids(), flush=True)
    cluster.mpirun(["sh", "-c", "echo up > /dev/shm/up; sleep 300"])
"""


@needs_cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_cluster_ends_with_whoever_made_it(number: int) -> None:
    command = [sys.executable, "-c", USER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **process_options()) as user:
        assert user.stdout is not None
        pids = [int(pid) for pid in user.stdout.readline().split()]
        hosts = pids[1:]
        deadline = time.monotonic() + 20
        while not all(Path(f"/proc/{pid}/root/dev/shm/up").exists() for pid in hosts):
            assert time.monotonic() < deadline, "the ranks did not start"
            time.sleep(0.05)
        user.send_signal(number)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if alive(pid)] == []


def interfaces_and_mounts() -> tuple[set[str], str]:
    return set(os.listdir("/sys/class/net")), Path("/proc/self/mounts").read_text()


def alive(pid: int) -> bool:
    """Zombies have ended: a container's first process may leave orphans unreaped."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"
