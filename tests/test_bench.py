"""``python -m pycomm bench`` on small sizes: what it prints, checks and refuses, not how fast."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from launchers import mpirun

from pycomm import cli, cost
from pycomm.bench import report, sizes
from pycomm.bench.peers import free_port, torch_commands
from pycomm.bench.ranks.measure import COLLECTIVES, Array, Bench, expected, shapes, values
from pycomm.bench.rounds import Entry, measure
from pycomm.bench.team import Team
from pycomm.errors import CommError, InvalidArgumentError


def bench(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pycomm", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_sizes_count_by_fours_or_are_a_list() -> None:
    assert sizes.parse("4:64") == [4, 16, 64]
    assert sizes.parse("4:100") == [4, 16, 64]
    assert sizes.parse("4,1K,2MiB") == [4, 1024, 2 << 20]


@pytest.mark.parametrize(
    "text", ["", "x", "4:", "64:4", "3", "0", "-4", "6:12", "4:8:16", "0:0", "-4:8", "4:8T", "4,"]
)
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"bench: --sizes .*Pass FIRST:LAST"):
        sizes.parse(text)


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_expected_results_follow_their_definition(collective: str) -> None:
    size = 3
    count, result_count = shapes(collective, 360, size)
    inputs = numpy.stack([values(count, rank) for rank in range(size)])
    for rank in range(size):
        block = slice(rank * count // size, (rank + 1) * count // size)
        want = {
            "all_reduce": inputs.sum(axis=0),
            "reduce_scatter": inputs.sum(axis=0)[block],
            "all_gather": inputs.reshape(-1),
            "broadcast": inputs[0],
            "all_to_all": inputs[:, block].reshape(-1),
            "send_recv": inputs[rank - 1],
        }[collective]
        got = expected(collective, count, rank, size)
        assert got.size == result_count
        assert numpy.array_equal(got, want)


def test_bus_factors_are_those_of_nccl_tests() -> None:
    assert report.bus_factor("all_reduce", 4) == pytest.approx(1.5)
    assert report.bus_factor("all_gather", 4) == pytest.approx(0.75)
    assert report.bus_factor("broadcast", 4) == 1.0


class ScriptedTurns:
    """A contender whose two ranks answer from a script."""

    def __init__(self, label: str, log: list[str], fails: bool = False) -> None:
        self.label = label
        self.variants = ["bucket"]
        self.version = "0"
        self.log = log
        self.fails = fails

    def turn(self, *, variant: str, collective: str, nbytes: int, repeat: int) -> list[list[float]]:
        self.log.append(self.label)
        if self.fails:
            raise CommError("broken")
        return [[1.0] * repeat, [2.0] * repeat]


def test_turns_rotate_and_the_slowest_rank_counts() -> None:
    log: list[str] = []
    entries = [Entry(ScriptedTurns(label, log), "bucket") for label in ("a", "b", "c")]
    measured = measure(entries, "all_gather", [4], rounds=2)
    assert "".join(log) == "abc" + "bca" + "cab"  # the first is the warm-up
    assert measured.median(4, "a", "bucket") == 2.0


def test_a_contender_that_fails_is_left_out_and_named() -> None:
    log: list[str] = []
    entries = [
        Entry(ScriptedTurns("good", log), "bucket"),
        Entry(ScriptedTurns("bad", log, fails=True), "bucket"),
    ]
    measured = measure(entries, "all_gather", [4, 8], rounds=2)
    assert measured.failures == {"bad": "broken"}
    assert log.count("bad") == 1
    assert measured.median(8, "good", "bucket") == 2.0


def test_all_reduce_against_gloo(tmp_path: Path) -> None:
    files = [f"--json={tmp_path / 'out.json'}", f"--markdown={tmp_path / 'out.md'}"]
    files.append(f"--plot={tmp_path / 'out.png'}")
    done = bench("all_reduce", "--sizes", "4,64K", "--peers", "gloo", "--rounds", "2", *files)
    assert done.returncode == 0, done.stderr
    assert "all_reduce, 2 ranks" in done.stdout
    assert "MiB of staging a rank and group" in done.stdout
    whole = json.loads((tmp_path / "out.json").read_text())
    assert [row["nbytes"] for row in whole["rows"]] == [4, 65536]
    for row in whole["rows"]:
        for name in ("bucket_s", "tensor_s", "core_s", "limit_s", "best_peer_s"):
            assert math.isfinite(row[name]) and row[name] > 0, name
    lines = (tmp_path / "out.md").read_text().splitlines()
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_a_peer_that_cannot_be_installed_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bench(
        *("all_reduce", "--sizes", "4", "--peers", "mpich", "--rounds", "2"),
        *("--environments", str(tmp_path / "file"), "--json", str(tmp_path / "out.json")),
    )
    assert done.returncode == 1
    assert "bench: mpich was left out." in done.stderr
    assert "Not a directory" in done.stderr
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["bucket_s"] > 0
    assert row["peers"] == {"mpich": None}


def test_under_mpirun_on_several_hosts(tmp_path: Path) -> None:
    """The MPI below is a peer; what the cores of one host could do is no limit there."""
    done = mpirun(
        2,
        """
        import sys
        from pycomm import cli, cost
        sys.exit(cli.main(["bench", "all_reduce", *sys.argv[1:]]))
        """,
        *("--sizes", "4K", "--peers", "mpi,gloo", "--rounds", "2", "--bound-mbit", "1000"),
        *("--json", str(tmp_path / "out.json")),
        PYCOMM_HOSTS="a,b",
    )
    assert done.returncode == 0, done.err
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert row["limit_s"] == pytest.approx(4096 * 8 / 1e9)
    assert row["round_trip_s"] is None
    for seconds in (row["bucket_s"], row["tensor_s"], *row["peers"].values()):
        assert seconds > 0


def test_every_collective_has_right_results() -> None:
    commands = torch_commands("pycomm.bench.ranks.own", 3, free_port())
    with Team("pycomm", commands, 3) as team:
        assert team.hello["variants"][:2] == ["bucket", "tensor"]
        for collective in COLLECTIVES:
            for variant in ("bucket", "tensor"):
                for nbytes in (4, 16 << 10):
                    # The ranks compare every result with what it must be.
                    answers = team.turn(
                        variant=variant, collective=collective, nbytes=nbytes, repeat=2
                    )
                    assert [len(samples) for samples in answers] == [2, 2, 2]
                    assert all(seconds > 0 for samples in answers for seconds in samples)


def test_a_wrong_result_is_found() -> None:
    class Forgetful:
        rank, size = 1, 2

        def variants(self) -> list[str]:
            return ["only"]

        def version(self) -> str:
            return "0"

        def arrays(self, variant: str, counts: Sequence[int]) -> list[Array]:
            return [numpy.zeros(count, numpy.float32) for count in counts]

        def call(self, variant: str, collective: str, source: Array, target: Array) -> Any:
            return lambda: None

        def barrier(self) -> None:
            pass

    with pytest.raises(ValueError, match=r"rank 1: element 0 of 4 is 4\.0 instead of 5\.0"):
        Bench(Forgetful(), "only", "all_reduce", 16).samples(1)


def test_step_prints_what_synchronisation_costs() -> None:
    done = bench("step", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    assert "synchronisation ms" in done.stdout
    assert "of DistributedDataParallel on gloo" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["all_reduce", "--peers", "horovod"], "unknown peer horovod. Pass some of openmpi"),
        (["all_reduce", "--sizes", "3"], "3 bytes are no whole float32"),
        (["all_reduce", "--ranks", "0"], "--ranks 0: pass at least 1"),
        (["all_reduce", "--rounds", "1"], "--rounds 1: pass at least 2, the first is not counted"),
        (["all_reduce", "--bound-mbit", "nan"], "--bound-mbit nan: pass a number of Mbit/s"),
        (["all_reduce", "--plot", "out.txt"], "end it in .png, .svg or .pdf"),
        (["all_reduce", "--ranks", "100001"], "1 x 100001 processes with messages of 67108864 by"),
        (
            ["all_reduce", "--sizes", "4,999999G"],
            "Pass fewer --ranks or --peers or smaller --sizes",
        ),
        (["step", "--ranks", "100001"], "1 x 100001 processes"),
        (["all_reduce", "--json", "/nowhere/out.json"], "/nowhere/out.json cannot be written: No"),
        (["all_reduce", "--json", "/proc/out.json"], "/proc/out.json cannot be written: No such"),
        (["all_reduce", "--markdown", "/tmp"], "/tmp cannot be written: Is a directory"),
        (["calibrate"], "start it on them"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    printed = capsys.readouterr().err
    assert text in printed
    assert len(printed.strip().splitlines()) == 1


def test_step_under_a_launcher_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    assert cli.main(["bench", "step"]) == 2
    assert "run it without a launcher" in capsys.readouterr().err


def python(code: str) -> list[tuple[list[str], dict[str, str]]]:
    return [([sys.executable, "-c", code], dict(os.environ))]


def test_a_team_that_cannot_start_says_what_it_printed() -> None:
    with pytest.raises(
        CommError, match=r"(?s)broken: its ranks ended with status 3.*no such thing"
    ):
        Team("broken", python("import sys; print('no such thing'); sys.exit(3)"), 1)


def calibrate(path: Path) -> tuple[int, str]:
    program = "import sys; from pycomm import cli; sys.exit(cli.main(['bench', 'calibrate']))"
    done = mpirun(2, program, PYCOMM_HOSTS="a,b", PYCOMM_COST_FILE=str(path))
    return done.returncode, done.out + done.err


@pytest.mark.parametrize("before", [None, "{"], ids=["missing", "damaged"])
def test_calibrate_replaces_a_file_that_init_would_refuse(
    before: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "site" / "cost.json"
    if before is not None:
        path.parent.mkdir()
        path.write_text(before)
    code, printed = calibrate(path)
    assert code == 0, printed
    assert f"{path}: CostModel(" in printed
    assert cost.load({"PYCOMM_COST_FILE": str(path)}).alpha_s > 0


def test_calibrate_refuses_a_file_that_it_cannot_write() -> None:
    code, printed = calibrate(Path("/proc/cost.json"))
    assert code != 0
    assert "/proc/cost.json cannot be written: No such file" in printed


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("pycomm 0.")


@pytest.mark.parametrize(
    ("signum", "says"),
    [
        (signal.SIGINT, "interrupted; its ranks have been ended"),
        (signal.SIGTERM, "ended by SIGTERM; its ranks too"),
        (signal.SIGHUP, "ended by SIGHUP; its ranks too"),
    ],
)
def test_ctrl_c_and_other_signals_end_the_ranks(signum: signal.Signals, says: str) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "pycomm", "bench", "all_reduce", "--sizes", "4:64M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (ranks := children(running.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks, "no rank was started"
    time.sleep(1.0)
    running.send_signal(signum)
    _, printed = running.communicate(timeout=60)
    assert running.returncode == 128 + signum
    assert says in printed
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
