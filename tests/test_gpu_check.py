"""What `make gpu-check` runs, as far as a machine without GPUs can tell.

A *self-check* takes CPU tensors, and gloo for NCCL: it finds mistakes in the tests for GPUs and in
the table, and says nothing about GPUs.
"""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check
SPEC.loader.exec_module(gpu_check)

no_driver = pytest.mark.skipif(not gpu_check.no_gpu(), reason="this machine has a GPU")


@no_driver
def test_without_a_gpu_it_says_so_and_writes_nothing():
    before = gpu_check.REPORT.exists()
    done = subprocess.run(
        ["make", "gpu-check"], cwd=ROOT, capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )  # fmt: skip
    assert done.returncode != 0
    assert "gpu-check: there is no NVIDIA driver on this machine" in done.stderr
    assert gpu_check.REPORT.exists() == before
    assert not (ROOT / ".venv-gpu").exists()


def test_a_pytorch_without_cuda_is_no_environment_for_it(capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "output_of", lambda command, device="cuda": "0\n")
    assert gpu_check.check("/some/python") == 2
    assert "the PyTorch of /some/python finds no GPU" in capsys.readouterr().err


@pytest.mark.timeout(280)
def test_self_check_of_the_tests():
    command = gpu_check.torchrun(
        sys.executable, 2, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"
    )
    status, printed = gpu_check.run(command, 250, PYCOMM_GPU_CHECK="cpu")
    assert status == 0, printed
    assert " passed" in printed


@pytest.mark.timeout(100)
def test_self_check_of_a_test_in_ranks_of_its_own(monkeypatch):
    name = "tests/gpu/test_calls.py::test_grouped"
    monkeypatch.setattr(gpu_check, "output_of", lambda command, device: f"{name}\n")
    (outcome,) = gpu_check.run_tests(sys.executable, 1, device="cpu")
    assert outcome.passed is True and name in outcome.name


@pytest.mark.timeout(150)
@pytest.mark.parametrize("name", ["late", "killed"])
def test_self_check_of_faults(name):
    ranks, expected = gpu_check.FAULTS[name]
    outcome = gpu_check.fault(sys.executable, name, ranks, expected, device="cpu")
    assert outcome.passed, outcome.text


@pytest.mark.timeout(150)
def test_self_check_of_the_table():
    figures = gpu_check.table(
        sys.executable, 2, "--largest", "4096", "--rounds", "1", "--width", "16"
    )
    assert isinstance(figures, dict), figures
    text = gpu_check.tables(figures)
    for collective in ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"):
        assert f"### {collective}, float32" in text and f"### {collective}, bfloat16" in text
    assert "### send_recv, float32" in text
    assert "| pycomm, exact order |" in text and "| torch.distributed |" in text
    assert text.count("\n| 4096 |") == 12


def test_bandwidths_are_those_of_nccl_tests():
    figures = {
        "ranks": 4, "rounds": 3, "peer": "nccl", "width": 8, "step": {"pycomm": 0.001},
        "rows": [
            {"collective": "all_reduce", "dtype": "float32", "nbytes": 1 << 30, "bus_factor": 1.5,
             "seconds": {"pycomm": 0.01, "torch.distributed": 0.02}},
        ],
    }  # fmt: skip
    text = gpu_check.tables(figures)
    # 2**30 bytes in 10 ms, and 2 * 3/4 of that on the bus; the peer takes twice as long.
    row = "| 1073741824 | 10000.0 | 107.37 | 161.06 | 20000.0 | 53.69 | 80.53 | 2.00 |"
    assert row in text


def test_ranks_that_hang_are_ended_though_they_have_sessions_of_their_own():
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    launcher = (
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {hang!r}], start_new_session=True)\n"
        "print(rank.pid, flush=True)\n"
        "rank.wait()\n"
    )
    status, printed = gpu_check.run([sys.executable, "-c", launcher], 3)
    assert status == 124 and "ended after 3 s" in printed
    stat = Path(f"/proc/{int(printed.split()[0])}/stat")
    for _ in range(100):  # the kernel takes a moment
        ended = not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"
        if ended:
            break
        time.sleep(0.05)
    assert ended


@pytest.mark.parametrize(("status", "printed", "passed"), [
    (0, "PASSED tests/gpu/x.py::y\n1 passed in 1s", True),
    (0, "SKIPPED [1] tests/gpu/x.py:9: there is one GPU\n1 skipped", None),
    (0, "no tests ran", False),
    (1, "PASSED tests/gpu/x.py::y\n1 passed in 1s\nrank 1 died", False),
    (124, "(ended after 300 s)", False),
])  # fmt: skip
def test_a_test_counts_as_passed_only_if_it_did(status, printed, passed):
    outcome = gpu_check.verdict("x", status, printed)
    assert outcome.passed is passed
    assert passed is not False or printed in outcome.text


def test_the_report_says_what_failed_and_what_was_not_run():
    outcomes = [
        gpu_check.Outcome("a", True),
        gpu_check.Outcome("b", False, "exit status 1\nthe reason"),
        gpu_check.Outcome("c", None, "needs 2 GPUs"),
    ]
    text = gpu_check.report({"GPUs": "H100"}, 1, outcomes, {1: "exit status 7"}, finished=False)
    for part in (
        "**Not finished**",
        "**One GPU**: no two ranks have exchanged anything",
        "H100",
        "1 passed, 1 failed, 1 skipped",
        "### failed: b",
        "the reason",
        "- c: needs 2 GPUs",
        "There are no figures",
    ):
        assert part in text
    assert "## Against bare NCCL\n\nNot run." in gpu_check.report({}, 2, outcomes, {}, True)


def test_a_report_is_written_whatever_ends_the_check(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "REPORT", tmp_path / "gpu-report.md")
    monkeypatch.setattr(gpu_check, "output_of", lambda command, device="cuda": "2\n")

    def ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: [gpu_check.Outcome("a", True)])
    monkeypatch.setattr(gpu_check, "fault", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check("python")
    text = gpu_check.REPORT.read_text()
    assert "**Not finished**" in text and "1 passed" in text
