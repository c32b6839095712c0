"""examples/train.py, started as a user starts it."""

import argparse
import csv
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TRAIN = Path(__file__).parent.parent / "examples" / "train.py"

# What Open MPI asks for as root and with fewer cores than ranks; other MPIs ignore it.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}

pytestmark = pytest.mark.timeout(180)


def train(ranks, *arguments, cwd):
    """Run train.py on that many ranks: with mpirun, or as one plain process."""
    launcher = []
    if ranks > 1:
        mpirun = shutil.which("mpirun")
        if mpirun is None:
            pytest.skip("there is no mpirun on PATH")
        launcher = [mpirun, "-np", str(ranks)]
    return subprocess.run(
        [*launcher, sys.executable, str(TRAIN), *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=150,
    )


def trained(ranks, *arguments, cwd):
    """The folder that a run leaves."""
    before = set(cwd.glob("runs/*"))
    done = train(ranks, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    (folder,) = set(cwd.glob("runs/*")) - before
    return folder


def load(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_state(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        for mine, other in zip(a, b, strict=True):
            assert_same_state(mine, other)
    else:
        assert a == b


def test_one_process_learns_the_digits(tmp_path):
    folder = trained(1, cwd=tmp_path)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 16))
    assert float(rows[-1]["accuracy"]) >= 0.97
    assert float(rows[-1]["loss"]) < 0.1 * float(rows[0]["loss"])
    assert all(0 <= float(row["wait_share"]) <= 1 for row in rows)
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """What two ranks leave after two epochs."""
    return trained(2, "--epochs", "2", cwd=tmp_path_factory.mktemp("two_epochs"))


def test_resuming_continues_as_if_never_stopped(two_epochs, tmp_path):
    whole = load(trained(2, "--epochs", "3", cwd=tmp_path))
    resumed = load(trained(2, "--epochs", "3", "--resume", str(two_epochs), cwd=tmp_path))
    for part in ("model", "optimizer", "schedule"):
        assert_same_state(resumed[part], whole[part])
    assert resumed["history"][:2] == load(two_epochs)["history"]


def test_resuming_on_another_number_of_ranks(two_epochs):
    folder = trained(1, "--epochs", "3", "--resume", "latest", cwd=two_epochs.parent.parent)
    history = load(folder)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[:2] == load(two_epochs)["history"]
    assert history[2]["loss"] < history[1]["loss"]


def test_verify_finds_no_difference(tmp_path):
    done = train(3, "--verify", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "largest parameter difference: 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "none"], "argument --epochs: 'none' is not a whole number of at least 1"),
        (["--resume", "a_file"], "--resume: a_file is not a checkpoint"),
        (["--runs", "a_file"], "Not a directory"),
    ],
)
def test_wrong_arguments_are_said_once(tmp_path, arguments, message):
    (tmp_path / "a_file").write_text("not a folder, not a checkpoint")
    done = train(2, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said.count("train.py: error: ") == 1
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("absent.pt", "absent.pt"),
        ("empty.pt", "empty.pt is not a checkpoint"),
        ("weights.pt", "weights.pt was not written by train.py"),
        ("finished.pt", "finished.pt has trained 3 epochs; ask for more with --epochs"),
        ("latest", "there is no .*checkpoint.pt yet"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, monkeypatch, resume, message):
    monkeypatch.syspath_prepend(TRAIN.parent)
    run_folder = importlib.import_module("run_folder")
    (tmp_path / "empty.pt").touch()
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    torch.save({"history": [{}, {}, {}]}, tmp_path / "finished.pt")
    path = resume if resume == "latest" else str(tmp_path / resume)
    arguments = argparse.Namespace(resume=path, runs=str(tmp_path / "runs"), epochs=3)
    with pytest.raises((OSError, ValueError), match=message):
        run_folder.read_checkpoint(arguments)
