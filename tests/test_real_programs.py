"""Ultralytics, MONAI, Lightning and Accelerate train on the backend "pycomm", and as on gloo.

As on gloo bit by bit: with two ranks each sum has two terms, whose order makes no difference.
`make test-programs` installs the programs, each in a folder of its own in .programs/.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import launchers
import pytest
from example_runs import ENVIRONMENT, EXAMPLES

PROGRAMS = Path(__file__).parent.parent / ".programs"
SCRIPTS = {
    "accelerate": "train_accelerate.py",
    "lightning": "train_lightning.py",
    "monai": "train_monai.py",
    "ultralytics": "train_yolo.py",
}
PACKAGES = Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)

pytestmark = [pytest.mark.real_programs, pytest.mark.timeout(600)]

# Written by whom: rank and path of each file that a rank opens to write, or makes a folder for.
PRELUDE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
written = set()
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        flags = arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.path.abspath(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove"):
        written.update(os.path.abspath(path) for path in arguments[:2] if isinstance(path, str))
sys.addaudithook(watch)
"""

# torchvision imports its Python side only if these two operators are declared. They are declared
# and not defined: a call would raise. YOLO26 without NMS makes none.
DECLARES_OPERATORS = """
import torch
for name in ("nms", "qnms"):
    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    torch.library.define(f"torchvision::{name}", signature)
"""

RUNS = """
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    lines = "".join(f"{path}\\n" for path in sorted(written))
    with open(f"{os.environ['WRITTEN']}.{rank}", "w") as file:
        file.write(lines)
"""


@dataclass(frozen=True)
class Run:
    """What two ranks left."""

    result: str  # the last line up to the weights
    backend: str
    checksum: str
    cwd: Path
    written: list[list[Path]]  # by rank


def environment(program: str) -> dict[str, str]:
    packages = PROGRAMS / program / PACKAGES
    if not (PROGRAMS / program / "installed").exists():
        pytest.skip(f"{program} is not installed in .programs/: make test-programs")
    return {
        **ENVIRONMENT,
        "PYTHONPATH": str(packages),
        "YOLO_AUTOINSTALL": "0",
        "YOLO_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }


@functools.cache
def why_torchvision_does_not_load() -> str:
    """Empty if it does."""
    done = subprocess.run(
        [sys.executable, "-c", "import torchvision"],
        env=environment("ultralytics"),
        capture_output=True,
        text=True,
    )
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def start(
    command: list[str], program: str, *arguments: str, cwd: Path, prelude: str = "", **more: str
) -> Run:
    """Run an example of two ranks by a command that starts its Python."""
    environ = environment(program)
    if program == "ultralytics" and why_torchvision_does_not_load():
        prelude += DECLARES_OPERATORS
    script = EXAMPLES / SCRIPTS[program]
    done = subprocess.run(
        [*command, "-c", PRELUDE + prelude + RUNS, str(script), *arguments],
        cwd=cwd,
        env={**environ, "WRITTEN": str(cwd / "written"), "YOLO_CONFIG_DIR": str(cwd), **more},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = re.fullmatch(
        r"(?P<result>.+); weights of 2 ranks on (?P<backend>\w+) equal, checksum (?P<checksum>\w+)",
        done.stdout.strip().splitlines()[-1],
    )
    assert last is not None, done.stdout
    written = [(cwd / f"written.{rank}").read_text().splitlines() for rank in range(2)]
    paths = [[Path(path) for path in rank] for rank in written]
    return Run(**last.groupdict(), cwd=cwd, written=paths)


def torchrun(program: str, *arguments: str, cwd: Path, **more: str) -> Run:
    command = [*launchers.torchrun_command(2), sys.executable]
    return start(command, program, *arguments, cwd=cwd, **more)


def mpirun(program: str, *arguments: str, cwd: Path, **more: str) -> Run:
    command = [*launchers.mpirun_command(2), sys.executable]
    return start(command, program, *arguments, cwd=cwd, **more)


@pytest.fixture(scope="module")
def on_gloo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    @functools.cache
    def run(program: str) -> Run:
        return torchrun(program, "--backend", "gloo", cwd=tmp_path_factory.mktemp("gloo"))

    return run


@pytest.fixture(scope="module")
def on_pycomm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    @functools.cache
    def run(program: str, launcher: Callable[..., Run]) -> Run:
        return launcher(program, cwd=tmp_path_factory.mktemp("pycomm"))

    return run


def assert_same(mine: Run, gloo: Run) -> None:
    """Results are written with all their digits, and checksums are of all weights' bits."""
    assert (mine.backend, gloo.backend) == ("pycomm", "gloo")
    assert (mine.result, mine.checksum) == (gloo.result, gloo.checksum)


@pytest.mark.parametrize("launcher", [torchrun, mpirun], ids=["torchrun", "mpirun"])
@pytest.mark.parametrize("program", SCRIPTS)
def test_trains_as_on_gloo(
    program: str,
    launcher: Callable[..., Run],
    on_gloo: Callable[[str], Run],
    on_pycomm: Callable[..., Run],
) -> None:
    assert_same(on_pycomm(program, launcher), on_gloo(program))


def test_ultralytics_with_the_operators_of_torchvision(tmp_path: Path) -> None:
    environment("ultralytics")
    reason = why_torchvision_does_not_load()
    if reason:
        pytest.skip(f"torchvision does not load here, only its declarations do: {reason}")
    assert torchrun("ultralytics", "--nms", cwd=tmp_path).backend == "pycomm"


def ultralytics(
    script: str, launcher: Callable[..., launchers.Result], tmp_path: Path, **more: str
):
    variables = {"PYTHONPATH": environment("ultralytics")["PYTHONPATH"]}
    ranks = () if launcher is launchers.alone else (2,)
    return launcher(*ranks, script, **variables, YOLO_CONFIG_DIR=str(tmp_path), **more)


def test_ultralytics_must_know_the_ranks(tmp_path: Path) -> None:
    """It is not told when torch does not load pycomm, and would train on its own."""
    script = """
    from ultralytics import YOLO
    import pycomm.ultralytics
    """
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = ultralytics(script, launchers.mpirun, tmp_path, **off)
    assert done.returncode != 0
    assert "takes this process for rank -1 of 1" in done.err, done.err
    assert "OMPI_COMM_WORLD_RANK=1" in done.err, done.err


def test_ultralytics_with_other_trainers_is_refused(tmp_path: Path) -> None:
    script = """
    from ultralytics.engine.trainer import BaseTrainer
    del BaseTrainer._setup_ddp
    import pycomm.ultralytics
    """
    done = ultralytics(script, launchers.alone, tmp_path)
    assert done.returncode != 0
    assert "ImportError: pycomm.ultralytics: " in done.err, done.err
    assert "'_setup_ddp': it was made for Ultralytics 8.4" in done.err, done.err


def test_ultralytics_alone_stays_as_it_was(tmp_path: Path) -> None:
    """One process makes no group and wraps no model."""
    script = f"""
    import sys
    from pathlib import Path
    sys.path.insert(0, {str(EXAMPLES)!r})
    import torch, train_yolo
    model = train_yolo.YOLO("yolo26n.yaml")
    model.train(
        data=train_yolo.write_data(Path({str(tmp_path / "shapes")!r}), 64), device="cpu", epochs=1,
        imgsz=64, project={str(tmp_path)!r}, plots=False, nms=False,
    )
    assert not torch.distributed.is_initialized()
    assert not hasattr(model.trainer.model, "module")
    """
    if why_torchvision_does_not_load():
        script = textwrap.dedent(DECLARES_OPERATORS) + textwrap.dedent(script)
    done = ultralytics(script, launchers.alone, tmp_path, YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0")
    assert done.returncode == 0, done.out + done.err


def test_dice_on_held_out_volumes(on_pycomm: Callable[..., Run]) -> None:
    result = on_pycomm("monai", torchrun).result
    score = re.search(r"Dice (0\.\d+) on 16 held-out volumes", result)
    assert score is not None and float(score[1]) > 0.8


@pytest.mark.parametrize("launcher", [torchrun, mpirun], ids=["torchrun", "mpirun"])
@pytest.mark.parametrize(
    ("program", "folder", "results"),
    [
        ("ultralytics", "runs/yolo/train", ["args.yaml", "results.csv", "weights"]),
        ("lightning", "runs/lightning/lightning_logs", ["version_0"]),
    ],
)
def test_only_rank_0_writes_results(
    program: str,
    folder: str,
    results: list[str],
    launcher: Callable[..., Run],
    on_pycomm: Callable[..., Run],
) -> None:
    run = on_pycomm(program, launcher)
    path = run.cwd / folder
    assert sorted(entry.name for entry in path.iterdir()) == results
    by_rank = [[file for file in files if path in file.parents] for files in run.written]
    assert by_rank[0] and not by_rank[1]


def test_lightning_starts_the_other_rank_itself(
    on_gloo: Callable[[str], Run], tmp_path: Path
) -> None:
    """It starts ``sys.argv`` again, so no prelude is in between."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / SCRIPTS["lightning"])],
        cwd=tmp_path,
        env=environment("lightning"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = on_gloo("lightning")
    assert done.stdout.strip().splitlines()[-1] == (
        f"{expected.result}; weights of 2 ranks on pycomm equal, checksum {expected.checksum}"
    )


@pytest.mark.parametrize("program", SCRIPTS)
def test_who_asks_for_gloo_can_be_given_pycomm(
    program: str, on_gloo: Callable[[str], Run], tmp_path: Path
) -> None:
    mine = torchrun(program, "--backend", "gloo", cwd=tmp_path, PYCOMM_TORCH_BACKEND="1")
    assert_same(mine, on_gloo(program))
