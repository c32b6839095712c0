"""examples/train_gpt.py: the same model whatever the ranks are for."""

from __future__ import annotations

import csv
import functools
import importlib
import re
from pathlib import Path

import example_runs
import pytest
import torch

import pycomm

run = functools.partial(example_runs.run, "train_gpt.py")
folder_of = functools.partial(example_runs.folder_of, "train_gpt.py")

SMALL = ("--layers", "2", "--batch", "8", "--micro-batches", "2", "--every", "4")

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (("--dp", "2", "--pp", "2"), 0.0),
        (("--pp", "2", "--tp", "2"), 1e-11),  # AdamW divides small gradients by their own size
    ],
)
def test_verify_finds_what_one_process_gets(
    arguments: tuple[str, ...], most: float, tmp_path: Path
) -> None:
    done = run(4, *arguments, *SMALL, "--steps", "6", "--verify", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said, difference = done.stdout.splitlines()[-1].split(": ")
    assert said == "largest parameter difference"
    assert float(difference) <= most


def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    folder = folder_of(4, "--dp", "2", "--pp", "2", *SMALL, "--steps", "8", cwd=tmp_path)
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8]
    assert float(rows[1]["test_loss"]) < float(rows[0]["test_loss"]) < 5.8
    assert all(0 <= float(row["pipe_wait_share"]) <= 1 for row in rows)
    assert float(rows[0]["bubble"]) == pytest.approx(1 / 3)
    assert (folder / "metrics.png").read_bytes().startswith(b"\x89PNG")

    whole = folder_of(1, *SMALL, "--steps", "12", cwd=tmp_path)
    resumed = folder_of(
        2, "--tp", "2", *SMALL, "--steps", "12", "--resume", str(folder), cwd=tmp_path
    )
    read = [pycomm.checkpoint.read(path / "checkpoint") for path in (whole, resumed)]
    assert [row["step"] for row in read[1]["history"]] == [4, 8, 12]
    for name, value in read[0]["model"].items():
        torch.testing.assert_close(read[1]["model"][name], value, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dp", "3"), "2 ranks are not --dp 3 x --pp 1 x --tp 1"),
        (("--tp", "8"), "2 ranks are no multiple of --pp 1 x --tp 8"),
        (("--batch", "3"), "--batch 3 does not divide among 2 replicas"),
        (
            ("--batch", "4"),
            "--micro-batches 4 are more than the 2 passages that each of 2",
        ),
        (("--verify", "--resume", "latest"), "--verify repeats the whole training"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(example_runs.EXAMPLES)
    monkeypatch.setattr("pycomm.size", lambda: 2)
    monkeypatch.setattr("pycomm.rank", lambda: 0)
    monkeypatch.setattr("sys.argv", ["train_gpt.py", *arguments])
    gpt_arguments = importlib.reload(importlib.import_module("gpt_arguments"))
    with pytest.raises(SystemExit):
        gpt_arguments.parse_arguments()
    assert f"train_gpt.py: error: {message}" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_said_once(tmp_path: Path) -> None:
    done = run(2, "--resume", "nowhere", cwd=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said
    assert said.count("train_gpt.py: error: --resume: ") == 1
    assert re.search("there is no .*nowhere", said), said
