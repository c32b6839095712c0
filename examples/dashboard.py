"""What rank 0 shows while it trains."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

import pycomm


class _Console(Console):
    """Never hides the cursor: an interrupted launcher kills its ranks before they could show it."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Dashboard:
    """A progress bar with loss, speed and the shares of time spent waiting.

    On ranks other than 0 it shows nothing.

    Args:
        total: how many steps there are in all.
        unit: what is counted a second.
        waits: what there is to wait for.
    """

    def __init__(self, total: int, unit: str, waits: Sequence[str]) -> None:
        self._unit, self._waits = unit, waits
        nothing_yet: dict[str, Any] = dict.fromkeys(waits, 0.0)
        shares = ", ".join(f"{{task.fields[{name}]:3.0%}} {name}" for name in waits)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn(
                f"loss {{task.fields[loss]:.3f}}  {{task.fields[speed]:5.0f}} {unit}/s  "
                f"wait: {shares}"
            ),
            console=_Console(),
            disable=pycomm.rank() != 0,
        )
        self._task = self._progress.add_task("", total=total, loss=0.0, speed=0.0, **nothing_yet)

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

    def print(self, text: str) -> None:
        """Above the bar, without markup."""
        if pycomm.rank() == 0:
            self._progress.console.print(text, markup=False, highlight=False)

    def begin(self, description: str, steps_before: int) -> None:
        """A period begins, over which speed and waiting are measured."""
        self._began, self._counted = time.perf_counter(), 0
        self._waited = dict.fromkeys(self._waits, 0.0)
        self._progress.update(self._task, description=description, completed=steps_before)

    def step(self, loss: float, count: int, waited: Mapping[str, float]) -> None:
        """One step is done, of ``count`` units, in which seconds were waited."""
        self._counted += count
        for name, seconds in waited.items():
            self._waited[name] += seconds
        speed, shares = self._rates()
        self._progress.update(self._task, advance=1, loss=loss, speed=speed, **shares)

    def end(self) -> dict[str, float]:
        """What was measured in the period."""
        speed, shares = self._rates()
        waits = {f"{name}_wait_share": share for name, share in shares.items()}
        return {f"{self._unit}_per_second": speed, **waits}

    def _rates(self) -> tuple[float, dict[str, Any]]:
        seconds = time.perf_counter() - self._began
        shares = {name: waited / seconds for name, waited in self._waited.items()}
        return self._counted / seconds, shares
