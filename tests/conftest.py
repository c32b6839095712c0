"""What every test run shares: which tests run where, who reports, and what a hang leaves behind.

The tests marked ``mpi`` run under mpirun, where each rank is a pytest process that runs the same
tests in the same order; the others in processes of their own. Those marked ``gpu`` run where
``make gpu-check`` starts them, under torchrun; those marked ``double_autograd`` where
tests/test_double_pipeline.py starts them. ``[tool.pytest.ini_options]`` has the times
after which a test counts as hanging.
"""

import ctypes
import faulthandler
import os
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
from launchers import files_of_mpirun, remove_files_of_killed_mpiruns

ON_GPUS = "PYCOMM_GPU_CHECK" in os.environ
AUTOGRAD = os.environ.get("PYCOMM_DOUBLE_AUTOGRAD")
if AUTOGRAD:
    ctypes.CDLL(AUTOGRAD)  # before torch is imported, which asks once whether there is CUDA


def from_launcher(*names: str) -> str | None:
    """The first of these variables that there is; torchrun's only if it was us who started it."""
    return next(
        (os.environ[name] for name in names[: 3 if ON_GPUS else 2] if name in os.environ), None
    )


# What every rank did last is saved upon errors, of which tests make many: only where they ask.
os.environ.setdefault("PYCOMM_TRACE_FOLDER", "")

RANK = int(from_launcher("OMPI_COMM_WORLD_RANK", "PMI_RANK", "RANK") or 0)
WORLD_SIZE = int(from_launcher("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE") or 1)
UNDER_MPIRUN = "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ

SECONDS_TO_START_OR_END = 60.0  # to collect the tests; to exit after the last one
SECONDS_TO_PRINT = 15.0  # every rank's stacks, before the first rank to be ended ends the job
STDERR = pytest.StashKey[int]()
MPIRUN_FILES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# Ranks and threads share few cores, so no deadline for one example. Under mpirun every rank must
# draw the same examples, and replay none that only it has seen fail.
hypothesis.settings.register_profile("one process", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ranks", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ranks" if WORLD_SIZE > 1 else "one process")


def dump_stacks_later(seconds: float, config: pytest.Config) -> None:
    """Show where a hang is: by a thread of faulthandler, which does not need the GIL.

    The process is not ended here: mpirun would end the other ranks before they have printed theirs.
    pytest-timeout does it during a test, and else the ``timeout`` in the Makefile.
    """
    faulthandler.dump_traceback_later(seconds, file=config.stash[STDERR])


@pytest.hookimpl(tryfirst=True)  # before pytest's reporter takes sys.stdout
def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)  # which is captured later
    if config.getoption("dist", "no") == "no":  # else the processes that run tests watch themselves
        dump_stacks_later(SECONDS_TO_START_OR_END, config)
    if RANK != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    if not UNDER_MPIRUN:
        folder = tempfile.TemporaryDirectory(prefix="pycomm-", ignore_cleanup_errors=True)
        config.stash[MPIRUN_FILES] = folder
        os.environ.update(files_of_mpirun(Path(folder.name)))


def pytest_unconfigure(config: pytest.Config) -> None:
    if MPIRUN_FILES in config.stash:
        config.stash[MPIRUN_FILES].cleanup()
    if not hasattr(config, "workerinput"):  # else pytest-xdist's, which stays until all are done
        dump_stacks_later(SECONDS_TO_START_OR_END, config)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    dump_stacks_later(max(_timeout_s(item) - SECONDS_TO_PRINT, 1.0), item.config)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        if MPIRUN_FILES in item.config.stash:
            remove_files_of_killed_mpiruns(Path(item.config.stash[MPIRUN_FILES].name))


def _timeout_s(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0] if mark else item.config.getini("timeout"))


def _longest_files_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those with a test that may take longest, then those of most tests.

    Whole files go to one process: a long one that came last would leave the others without work.
    """
    longest: dict[object, float] = {}
    tests: dict[object, int] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0.0), _timeout_s(item))
        tests[item.path] = tests.get(item.path, 0) + 1
    return sorted(items, key=lambda item: (-longest[item.path], -tests[item.path], item.path))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here, elsewhere = [], []
    for item in items:
        marked = item.get_closest_marker("mpi") is not None
        on_gpus = item.get_closest_marker("gpu") is not None
        on_double = item.get_closest_marker("double_autograd") is not None
        runs = on_gpus if ON_GPUS else marked == UNDER_MPIRUN and not on_gpus
        runs &= on_double == bool(AUTOGRAD)
        (here if runs else elsewhere).append(item)
    items[:] = here if UNDER_MPIRUN else _longest_files_first(here)
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End the job when a test fails on any rank: the other ranks would wait for this one."""
    if WORLD_SIZE == 1 or not report.failed:
        return
    sys.stdout.flush()
    lines = [f"FAILED on rank {RANK} of {WORLD_SIZE}: {report.nodeid} ({report.when})"]
    lines.append(report.longreprtext)
    lines += [f"--- {title} ---\n{text}" for title, text in report.sections]
    print("\n" + "\n".join(lines), file=sys.stderr, flush=True)
    time.sleep(2)  # a rank that fails for the same reason, or because of this one, may say so
    os._exit(1)  # no clean-up: it would wait for ranks that are elsewhere. mpirun ends them
