"""What a training run leaves behind: runs/<time>/ with metrics.csv, metrics.png, checkpoint.pt."""

import argparse
import csv
import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from arguments import parser
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

import pycomm


class RunFolder:
    """Rank 0 writes it; the other ranks know it, too, and what it was resumed from."""

    def __init__(self, path: Path, checkpoint: dict[str, Any] | None) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.history: list[dict[str, float]] = [*checkpoint["history"]] if checkpoint else []

    def record(
        self,
        row: dict[str, float],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
    ) -> None:
        """An epoch is over: write its metrics and a checkpoint that can be resumed from here."""
        self.history.append(row)
        if pycomm.rank() != 0:
            return
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "history": self.history,
        }
        # Under another name first: whoever is interrupted here still has the previous epoch's.
        unfinished = self.path / "checkpoint.pt.unfinished"
        torch.save(state, unfinished)
        os.replace(unfinished, self.path / "checkpoint.pt")
        with open(self.path / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.history)

    def report(self) -> None:
        """Plot the metrics and say where everything lies."""
        if pycomm.rank() != 0:
            return
        _plot(self.history, self.path / "metrics.png")
        accuracy = self.history[-1]["accuracy"]
        print(f"test accuracy {accuracy:.2%} after {len(self.history)} epochs, see {self.path}/")


def open_run(args: argparse.Namespace) -> RunFolder:
    """Make the folder and read the checkpoint to resume from, on rank 0 for all.

    What goes wrong there is said like a wrong argument, and ends all ranks.
    """
    path, checkpoint, problem = Path(), None, ""
    if pycomm.rank() == 0:
        try:
            if args.resume:
                checkpoint = read_checkpoint(args)
            path = _make_folder(Path(args.runs))
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
        except ValueError as error:
            problem = str(error)
    path, checkpoint, problem = pycomm.broadcast_object((path, checkpoint, problem))
    if problem:
        parser.error(problem)
    return RunFolder(path, checkpoint)


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


def read_checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    path = Path(args.resume)
    if args.resume == "latest":
        found = sorted(Path(args.runs).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise ValueError(f"--resume latest: there is no {args.runs}/*/checkpoint.pt yet")
        path = found[-1]
    elif path.is_dir():
        path /= "checkpoint.pt"
    try:
        checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"--resume: {path} is not a checkpoint ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, dict) or "history" not in checkpoint:
        raise ValueError(f"--resume: {path} was not written by train.py")
    trained = len(checkpoint["history"])
    if trained >= args.epochs:
        raise ValueError(
            f"--resume: {path} has trained {trained} epochs; ask for more with --epochs"
        )
    return checkpoint


def _plot(history: list[dict[str, float]], path: Path) -> None:
    import matplotlib  # here, because it is slow to import and rank 0 alone plots

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["loss"] for row in history])
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.plot(epochs, [row["accuracy"] for row in history])
    right.set(xlabel="epoch", ylabel="test accuracy")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
