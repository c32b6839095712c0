"""What a training run leaves behind: runs/<time>/ with metrics.csv, metrics.png, checkpoint/."""

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from command_line import RankZeroParser

import pycomm


class RunFolder:
    """Rank 0 writes the metrics, all ranks the checkpoint.

    Args:
        source: the checkpoint to go on from.
    """

    def __init__(self, path: Path, source: Path | None, parser: RankZeroParser) -> None:
        self.path = path
        self.history: list[dict[str, float]] = []
        self._source, self._parser = source, parser

    def resume(self, state: dict[str, Any], period: str, until: int) -> None:
        """Load ``state`` and the metrics so far, if there is something to go on from.

        Args:
            period: the name of what the history counts, such as "epoch", and of the option that
                says until when to train.
        """
        if self._source is None:
            return
        try:
            loaded = pycomm.checkpoint.load(self._source, {**state, "history": []})
        except pycomm.InvalidArgumentError as error:
            self._refuse(str(error))
        self.history = loaded["history"]
        trained = int(self.history[-1][period])
        if trained >= until:
            self._refuse(
                f"{self._source} has trained {trained} {period}s; ask for more with --{period}s"
            )

    def _refuse(self, problem: str) -> NoReturn:
        """End all ranks, and leave no folder in which nothing is."""
        if pycomm.rank() == 0:
            self.path.rmdir()
        self._parser.error(f"--resume: {problem}")

    def record(self, row: dict[str, float], state: dict[str, Any]) -> None:
        """Write what rank 0 measured, and a checkpoint from which a run can go on from here."""
        row = pycomm.broadcast_object(row)
        self.history.append(row)
        pycomm.checkpoint.save(self.path / "checkpoint", {**state, "history": self.history})
        if pycomm.rank() != 0:
            return
        with open(self.path / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.history)

    def report(self, result: str, period: str, plots: Sequence[Sequence[str]]) -> None:
        """Plot metrics against ``period``, a picture for each of ``plots``; say where they are."""
        if pycomm.rank() != 0:
            return
        _plot(self.history, period, plots, self.path / "metrics.png")
        print(f"{result}, see {self.path}/")


def open_run(args: argparse.Namespace, parser: RankZeroParser) -> RunFolder:
    """Make the folder and look for the checkpoint to resume from, on rank 0 for all.

    What goes wrong there is said like a wrong argument, and ends all ranks.
    """
    path, source, problem = Path(), None, ""
    if pycomm.rank() == 0:
        try:
            if args.resume:
                source = find_checkpoint(args)
            path = _make_folder(Path(args.runs))
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        except ValueError as error:
            problem = str(error)
    path, source, problem = pycomm.broadcast_object((path, source, problem))
    if problem:
        parser.error(problem)
    return RunFolder(path, source, parser)


def find_checkpoint(args: argparse.Namespace) -> Path:
    """The checkpoint that ``--resume`` names."""
    if args.resume != "latest":
        path = Path(args.resume)
        return path / "checkpoint" if (path / "checkpoint").is_dir() else path
    found = sorted(Path(args.runs).glob("*/checkpoint"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"--resume latest: there is no {args.runs}/*/checkpoint yet")
    return found[-1]


def _make_folder(runs: Path) -> Path:
    began = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 100):
        path = runs / (began if number == 1 else f"{began}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not path.is_dir():
                raise
    raise FileExistsError(f"{runs} holds 99 runs begun at {began}")


def _plot(
    history: list[dict[str, float]], period: str, plots: Sequence[Sequence[str]], path: Path
) -> None:
    import matplotlib  # here, because it is slow to import and rank 0 alone plots

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(plots), figsize=(4.5 * len(plots), 3.5), layout="constrained", squeeze=False
    )
    for axis, metrics in zip(axes[0], plots, strict=True):
        for metric in metrics:
            axis.plot(
                [row[period] for row in history],
                [row[metric] for row in history],
                marker=".",
                label=metric.replace("_", " "),
            )
        axis.set(xlabel=period)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
