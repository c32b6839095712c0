"""Run torch's own tests of a backend on pycomm: ``make test-torch-suite``.

They are ``torch.testing._internal.distributed.distributed_test``, part of the torch wheel. Most of
them are for named backends alone: ``--as gloo`` (the default) asks for gloo and lets
``PYCOMM_TORCH_BACKEND=1`` make pycomm of it, so that pycomm has to pass what gloo has to; ``--as
pycomm`` asks for pycomm, and torch skips what it does not expect an unknown backend to do.

    python scripts/torch_suite.py --ranks 4 --table out.md [pattern ...]

Each test has processes of its own, forked from this one, which has imported torch. What torch's
tests say about profiler events is left out, as for every backend it does not know: a blocking call
of pycomm runs in the thread that makes it, and its event is no asynchronous one.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

# Tests that expect gloo's own name or words, and the pattern of what each rank that fails has to
# say there. docs/torch-suite.md has the reasons.
_OF_OTHERS = (
    r'"Rank (\d+) successfully reached monitoredBarrier, but received errors while waiting for '
    r'send/recv from rank 0" does not match "monitored_barrier on rank \1: timeout. Rank '
)
_OTHER_WORDS = {
    "test_get_backend": "String comparison failed: 'pycomm' != 'gloo'",
    "test_monitored_barrier_failure_order": _OF_OTHERS + "2 failed",
    "test_monitored_barrier_gloo": _OF_OTHERS + "1 failed",
    "test_monitored_barrier_gloo_rank_0_timeout": (
        '"Rank 0 timed out in monitoredBarrier" does not match "monitored_barrier on rank 0: '
    ),
}


def main() -> int:
    arguments = _parser().parse_args()
    os.environ.update(
        BACKEND=arguments.backend,
        PYCOMM_TORCH_BACKEND="1",
        WORLD_SIZE=str(arguments.ranks),
        OMP_NUM_THREADS="1",
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEMP_DIR"] = folder
        suite = _suite(arguments.patterns)
        result = _Result()
        began = time.monotonic()
        suite.run(result)
    print(f"\n{result.summary()} in {time.monotonic() - began:.0f} s")
    if arguments.table:
        arguments.table.write_text(result.table())
    return 0 if result.wasSuccessful() else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--as", dest="backend", choices=("gloo", "pycomm"), default="gloo")
    parser.add_argument("--table", type=Path, help="write each test's outcome there, in Markdown")
    parser.add_argument("patterns", nargs="*", help="run tests whose name contains one of these")
    return parser


def _suite(patterns: list[str]) -> unittest.TestSuite:
    import torch  # makes "pycomm" known, and reads PYCOMM_TORCH_BACKEND
    import torch.distributed as dist
    from torch.testing._internal import common_distributed
    from torch.testing._internal.common_distributed import DistTestCases

    # What torch knows of its own backends.
    for feature in ("ddp", "subgroup", "plugin"):
        DistTestCases.backend_feature[feature].add("pycomm")
    from torch.testing._internal.distributed import distributed_test as suite

    import pycomm.torch_backend  # noqa: F401  # here, not in every process

    # Of files, between processes: ten seconds are too short for four of them on two cores.
    suite.Barrier.sync.__func__.__defaults__ = (None, 60)
    common_distributed.TIMEOUT_DEFAULT = 180

    class TestPycomm(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore[misc]
        def setUp(self) -> None:
            super().setUp()
            self._start_processes(torch.multiprocessing.get_context("fork").Process)

        def run_test(self, test_name: str, parent_pipe: Any) -> None:
            assert dist.get_backend() == "pycomm", dist.get_backend()
            super().run_test(test_name, parent_pipe)

    names = unittest.TestLoader().getTestCaseNames(TestPycomm)
    chosen = [n for n in names if not patterns or any(pattern in n for pattern in patterns)]
    return unittest.TestSuite(map(TestPycomm, chosen))


class _Result(unittest.TestResult):
    """Notes and prints one line a test."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: dict[str, tuple[str, str]] = {}

    def _note(self, test: unittest.TestCase, outcome: str, why: str = "") -> None:
        name = test.id().rpartition(".")[2]
        self.outcomes[name] = outcome, why
        print(f"{outcome:7} {name} {why.strip().splitlines()[-1] if why else ''}", flush=True)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        self._note(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:  # noqa: N802
        self._note(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if self._note_failure(test, err):
            super().addFailure(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        if self._note_failure(test, err):
            super().addError(test, err)

    def _note_failure(self, test: unittest.TestCase, err: Any) -> bool:
        """Whether it is more than a difference in words: of one rank, or of several, as torch
        joins them."""
        text, name = str(err[1]), test.id().rpartition(".")[2]
        of_ranks = re.split(r"Process \d+ exited with error code", text)[1:]
        pattern = _OTHER_WORDS.get(name)
        if pattern and of_ranks and all(re.search(pattern, each) for each in of_ranks):
            self._note(test, "differs", "see docs/torch-suite.md")
            return False
        self._note(test, "failed", text)
        print(text, file=sys.stderr)
        return True

    def summary(self) -> str:
        counts = collections.Counter(outcome for outcome, _ in self.outcomes.values())
        passed, skipped = counts["passed"], counts["skipped"]
        return (
            f"{passed} passed, {counts['differs']} differ in words, {counts['failed']} failed, "
            f"{skipped} skipped"
        )

    def table(self) -> str:
        rows = [
            f"| `{name}` | {outcome} | {why.strip().splitlines()[-1] if why else ''} |"
            for name, (outcome, why) in sorted(self.outcomes.items())
        ]
        return "\n".join(["| test | outcome | why |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
