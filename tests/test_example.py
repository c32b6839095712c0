"""examples/train.py, started as a user starts it."""

import csv
import functools
import re
import subprocess
import sys

import example_runs
import pytest
import torch

import pycomm

run = functools.partial(example_runs.run, "train.py")
folder_of = functools.partial(example_runs.folder_of, "train.py")

pytestmark = pytest.mark.timeout(180)


def load(folder):
    return pycomm.checkpoint.read(folder / "checkpoint")


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
    folder = folder_of(1, cwd=tmp_path)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 16))
    assert float(rows[-1]["accuracy"]) >= 0.97
    assert float(rows[-1]["loss"]) < 0.1 * float(rows[0]["loss"])
    assert all(0 <= float(row["grad_wait_share"]) <= 1 for row in rows)
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory):
    """What two ranks leave after two epochs."""
    return folder_of(2, "--epochs", "2", cwd=tmp_path_factory.mktemp("two_epochs"))


def test_resuming_continues_as_if_never_stopped(two_epochs, tmp_path):
    whole = load(folder_of(2, "--epochs", "3", cwd=tmp_path))
    resumed = load(folder_of(2, "--epochs", "3", "--resume", str(two_epochs), cwd=tmp_path))
    for part in ("model", "optimizer", "schedule"):
        assert_same_state(resumed[part], whole[part])
    assert resumed["history"][:2] == load(two_epochs)["history"]


def test_resuming_on_another_number_of_ranks(two_epochs):
    folder = folder_of(1, "--epochs", "3", "--resume", "latest", cwd=two_epochs.parent.parent)
    history = load(folder)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert history[:2] == load(two_epochs)["history"]
    assert history[2]["loss"] < history[1]["loss"]


def test_verify_finds_no_difference(tmp_path):
    done = run(3, "--verify", "--epochs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "largest parameter difference: 0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "none"], "argument --epochs: 'none' is not a whole number of at least 1"),
        (["--resume", "a_file"], "a_file is a file, and a checkpoint is a folder"),
        (["--runs", "a_file"], "Not a directory"),
    ],
)
def test_wrong_arguments_are_said_once(tmp_path, arguments, message):
    (tmp_path / "a_file").write_text("not a folder, not a checkpoint")
    done = run(2, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    said = done.stdout + done.stderr
    assert said.count("train.py: error: ") == 1
    assert message in said
    assert "Traceback" not in said


RESUMES = """
import argparse, pathlib, sys
sys.path.insert(0, {examples!r})
import torch, pycomm
from run_folder import RunFolder, find_checkpoint
pycomm.init()
class Parser:
    def error(self, message):
        raise ValueError(message)
model = torch.nn.Linear(2, 2)
pycomm.checkpoint.save("weights", {{"model": model}})
pycomm.checkpoint.save("finished", {{"model": model, "history": [{{"epoch": 3}}]}})
for resume in ["absent", "empty", "a_file", "weights", "finished", "latest"]:
    try:
        path = find_checkpoint(argparse.Namespace(resume=resume, runs="runs"))
        made = pathlib.Path("runs_made")
        made.mkdir()
        RunFolder(made, path, Parser()).resume({{"model": model}}, "epoch", 3)
    except ValueError as error:
        assert not made.exists()
        print(f"{{resume}}: {{error}}".replace(chr(10), " "))
"""


def test_what_cannot_be_resumed(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").touch()
    script = RESUMES.format(examples=str(example_runs.EXAMPLES))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for line, message in zip(
        said,
        [
            "absent: --resume: .*there is no .*absent",
            "empty: --resume: .*no checkpoint",
            "a_file: --resume: .*a_file is a file, and a checkpoint is a folder",
            "weights: --resume: .*'history'",
            "finished: --resume: finished has trained 3 epochs; ask for more with --epochs",
            r"latest: --resume latest: there is no runs/\*/checkpoint yet",
        ],
        strict=True,
    ):
        assert re.match(message, line)
