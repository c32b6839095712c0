"""What rank 0 shows while it trains."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

import pycomm


class _Console(Console):
    """Never hides the cursor: an interrupted launcher kills its ranks before they could show it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Dashboard:
    """A progress bar with loss, speed and the share of time spent waiting for gradients.

    On ranks other than 0 it shows nothing.

    Args:
        epochs, steps: how many epochs there are in all, and steps in one.
        batch: images that all ranks together take each step.
    """

    def __init__(self, epochs: int, steps: int, batch: int) -> None:
        self._epochs, self._steps, self._batch = epochs, steps, batch
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            TextColumn(
                "loss {task.fields[loss]:.3f}  {task.fields[speed]:5.0f} samples/s  "
                "{task.fields[wait]:3.0%} waiting"
            ),
            console=_Console(),
            disable=pycomm.rank() != 0,
        )
        self._task = self._progress.add_task(
            "", total=epochs * steps, loss=0.0, speed=0.0, wait=0.0
        )
        self._wait_seconds = 0.0

    def __enter__(self) -> "Dashboard":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin_epoch(self, epoch: int) -> None:
        self._began, self._steps_done = time.perf_counter(), 0
        self._waited_before = self._wait_seconds
        self._progress.update(
            self._task,
            description=f"epoch {epoch + 1:2d}/{self._epochs}",
            completed=epoch * self._steps,
        )

    def step(self, loss: float, wait_seconds: float) -> None:
        """One step is done; ``wait_seconds`` is the time waited for gradients since the start."""
        self._steps_done += 1
        self._wait_seconds = wait_seconds
        speed, wait = self._rates()
        self._progress.update(self._task, advance=1, loss=loss, speed=speed, wait=wait)

    def end_epoch(self) -> dict[str, float]:
        speed, wait = self._rates()
        return {"samples_per_second": speed, "wait_share": wait}

    def _rates(self) -> tuple[float, float]:
        seconds = time.perf_counter() - self._began
        waited = self._wait_seconds - self._waited_before
        return self._steps_done * self._batch / seconds, waited / seconds
