"""Start the ranks that run training cases, and tell what they saw.

    python -m torch_training.report FILE     # every case, on 2 and on 4 ranks

writes a table behind the line ``MARK`` of the file; what was there goes.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from launchers import process_options, torchrun_command

from torch_training.verdict import Verdict

TIMEOUT_S = 600
WORLD_SIZES = (2, 4)
MARK = "<!-- what follows is written by `make test-torch-training` -->\n"


@dataclasses.dataclass(frozen=True)
class Run:
    """What the ranks of one ``torchrun`` left.

    Attributes:
        verdicts: by case, of each rank that finished it.
        failures: what is wrong; empty if all is well.
    """

    verdicts: dict[str, list[Verdict]]
    failures: list[str]


def run_cases(world_size: int, folder: Path, *arguments: str) -> Run:
    """Run the cases of CI, or those that ``arguments`` of the runner choose."""
    runner = [sys.executable, "-m", "torch_training.runner", str(folder), *arguments]
    log = folder / "log"
    failures = []
    with log.open("w") as file:
        try:
            done = subprocess.run(
                [*torchrun_command(world_size), *runner],
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT_S,
                **process_options(),
            )
            if done.returncode:
                failures.append(f"torchrun ended with {done.returncode}")
        except subprocess.TimeoutExpired:
            failures.append(f"torchrun did not end within {TIMEOUT_S} s")
    verdicts: dict[str, list[Verdict]] = {}
    for rank in range(world_size):
        report = folder / f"rank{rank}.jsonl"
        for line in report.read_text().splitlines() if report.exists() else []:
            verdict = Verdict.read(json.loads(line))
            verdicts.setdefault(verdict.case, []).append(verdict)
    if not verdicts:
        failures.append("no rank finished a case")
    for case, of_ranks in verdicts.items():
        failures += [verdict.failure for verdict in of_ranks if verdict.failure]
        if len(of_ranks) != world_size:
            failures.append(f"{case}: {len(of_ranks)} of {world_size} ranks finished it")
    if failures:
        failures.append(f"the end of the log:\n{log.read_text()[-8000:]}")
    return Run(verdicts, failures)


def table(runs: dict[int, Run]) -> str:
    """What, on how many ranks, compared how, with which result; in Markdown."""
    names = dict.fromkeys(name for run in runs.values() for name in run.verdicts)
    lines = ["| what | ranks | compared with gloo | result |", "|---|---|---|---|"]
    for name in names:
        by_size = {size: run.verdicts[name] for size, run in runs.items() if name in run.verdicts}
        (summary,) = {v.summary for of_ranks in by_size.values() for v in of_ranks}
        how = _merged(by_size, _how)
        lines.append(f"| {summary} | {_numbers(by_size)} | {how} | {_merged(by_size, _result)} |")
    return "\n".join(lines) + "\n"


def _how(of_ranks: Sequence[Verdict]) -> str:
    if of_ranks[0].refused:
        return "errors"
    kind = f"rounding, {of_ranks[0].allowed:.2g}" if of_ranks[0].allowed else "bits"
    return f"{kind}; {of_ranks[0].compared} tensors"


def _result(of_ranks: Sequence[Verdict]) -> str:
    if any(v.failure for v in of_ranks):
        return "**fails**"
    if of_ranks[0].refused:
        return f"torch refuses it on both: “{of_ranks[0].refused}”"
    apart = max((v.difference.relative for v in of_ranks if v.difference), default=0.0)
    return f"off by {apart:.2g}" if apart else "same bits"


def _merged(by_size: dict[int, list[Verdict]], tell) -> str:
    cells = {size: tell(of_ranks) for size, of_ranks in by_size.items()}
    if len(set(cells.values())) == 1:
        return next(iter(cells.values()))
    return "; ".join(f"on {size}: {cell}" for size, cell in cells.items())


def _numbers(by_size: dict[int, list[Verdict]]) -> str:
    return ", ".join(map(str, by_size))


def main() -> None:
    file = Path(sys.argv[1])
    runs = {}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory() as folder:
            runs[world_size] = run_cases(world_size, Path(folder), "--all")
    text = file.read_text()
    before, mark, _ = text.partition(MARK)
    assert mark, f"{file} has no line {MARK}"
    file.write_text(f"{before}{MARK}\nPyTorch {torch.__version__}:\n\n{table(runs)}")
    failures = [failure for run in runs.values() for failure in run.failures]
    if failures:
        sys.exit("\n\n".join(failures))


if __name__ == "__main__":
    main()
