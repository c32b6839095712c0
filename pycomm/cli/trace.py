"""``python -m pycomm trace``: what every rank did last, side by side, and where they part."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pycomm import _core
from pycomm._core import OperationState
from pycomm.cli.trace_rows import Divergence, RankView, Row, first_divergence, rows
from pycomm.connection import DEFAULT_TRACE_FOLDER
from pycomm.errors import CommError

_MOST_COLUMNS = 8  # ranks in columns of their own
_ARENA = "/memfd:pycomm (deleted)"  # how /proc shows a descriptor of a rank's memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="a folder or file that an error has saved; otherwise the job that runs on this host "
        f"as this user or, without one, the newest folder in {DEFAULT_TRACE_FOLDER}/",
    )
    which.add_argument("--job", help="which of several running jobs: how its name begins")
    parser.add_argument("--last", type=_count, default=20, metavar="N", help="calls (default: 20)")
    parser.add_argument("--rank", type=int, metavar="R", help="all that one rank did, messages too")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of calls; pass at least 1")
    return int(text)


def run(chosen: argparse.Namespace) -> int:
    """Print it; 1 if there is nothing to print."""
    try:
        title, reason, ranks = _load(chosen)
    except CommError as error:
        print(error, file=sys.stderr)
        return 1
    console = Console(soft_wrap=True)
    console.print(Text(title, style="bold"))
    for view in ranks:
        console.print(f"  rank {view.rank}: {_state(view)}", highlight=False)
    if reason:
        console.print(Text(reason, style="red"))
    if chosen.rank is not None:
        return _print_rank(console, ranks, chosen.rank)
    aligned = rows(ranks)
    divergence = first_divergence(ranks, aligned)
    console.print(_table(ranks, aligned[-chosen.last :], divergence))
    for text in _unfinished_messages(ranks):
        console.print(text, highlight=False)
    found = str(divergence) if divergence else "All ranks have made the same calls."
    console.print(Text(found, style="bold"))
    return 0


# --- where it comes from -------------------------------------------------------------------------


def _load(chosen: argparse.Namespace) -> tuple[str, str, list[RankView]]:
    """A title, the error for which it was saved, and the ranks in order."""
    if chosen.source is None:
        running = live_jobs()
        names = _chosen_jobs(running, chosen.job or "")
        if names:
            [job] = names
            now_s = time.monotonic()
            return f"job {job[:8]}, running", "", [RankView(rank, now_s) for rank in running[job]]
    folder = chosen.source or _newest(Path(DEFAULT_TRACE_FOLDER))
    files = sorted(folder.glob("*.trace")) if folder.is_dir() else [folder]
    if not files:
        raise CommError(
            f"trace: {folder} has no file *.trace.\n  Pass a folder that an error named."
        )
    traces = [_core.read_trace(str(file)) for file in files]
    views = [RankView(rank, trace.now_s) for trace in traces for rank in trace.ranks]
    if not views:
        raise CommError(f"trace: {folder} holds no rank.")
    views.sort(key=lambda view: view.rank)
    saved_s = min(trace.now_s + trace.ranks[0].to_time_of_day_s for trace in traces)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_s))
    missing = set(range(views[0].size)) - {view.rank for view in views}
    title = f"job {views[0].job[:8]}, {views[0].size} ranks, saved {when}"
    if missing:
        title += f"; nothing of ranks {sorted(missing)}: their hosts have saved theirs elsewhere"
    return title, traces[0].reason, views


def _chosen_jobs(running: Iterable[str], prefix: str) -> list[str]:
    """The one job whose name begins so; none if none runs and none was asked for."""
    names = sorted(running)
    found = [job for job in names if job.startswith(prefix)]
    if prefix and not found:
        there = f"there are: {_short(names)}" if names else "no job of this user runs here"
        raise CommError(f"trace: no job on this host whose name begins with {prefix!r}; {there}.")
    if len(found) > 1:
        raise CommError(
            f"trace: several jobs run on this host: {_short(found)}.\n  Pass --job NAME."
        )
    return found


def _short(jobs: Iterable[str]) -> str:
    return ", ".join(job[:8] for job in jobs)


def _newest(folder: Path) -> Path:
    saved = sorted(folder.glob("pycomm-*"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise CommError(
            f"trace: no job of this user runs on this host, and {folder}/ has nothing that an "
            "error has saved.\n  Pass the folder that an error named."
        )
    return saved[-1]


def live_jobs() -> dict[str, list[_core.RankTrace]]:
    """The running jobs of this host that this user may look at: their ranks on it, by rank.

    A rank that is gone is found through its peers, which keep its memory.
    """
    found: dict[str, dict[int, _core.RankTrace]] = {}
    for path in _arenas():
        try:
            trace = _core.read_page_at(path)
        except CommError:  # ended meanwhile, or another version's
            continue
        if trace.job:  # else a test's
            found.setdefault(trace.job, {})[trace.rank] = trace
    return {job: [ranks[rank] for rank in sorted(ranks)] for job, ranks in found.items()}


def _arenas() -> Iterator[str]:
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:  # another user's, or ended
            continue
        for descriptor in descriptors:
            try:
                if os.readlink(descriptor) == _ARENA:
                    yield str(descriptor)
            except OSError:
                continue


# --- how it looks --------------------------------------------------------------------------------


def _state(view: RankView) -> str:
    state = "gone" if view.gone else "has left" if view.left else "alive"
    return f"{state}, process {view.process} on {view.host_name or 'host ' + str(view.host)}"


def _table(ranks: list[RankView], shown: list[Row], divergence: Divergence | None) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("call", overflow="fold")
    wide = len(ranks) > _MOST_COLUMNS
    for view in [] if wide else ranks:
        table.add_column(f"rank {view.rank}", no_wrap=True)
    if wide:
        table.add_column("ranks", overflow="fold")
    for row in shown:
        style = "bold red" if divergence is not None and row.key == divergence.row.key else ""
        cells = [_summary(row, ranks)] if wide else [_cell(row, view) for view in ranks]
        table.add_row(str(row), *cells, style=style)
    return table


def _cell(row: Row, view: RankView) -> str:
    record = row.records.get(view.rank)
    if record is None:
        return "-" if view.may_miss(row) else "not kept"
    text = view.progress(record)
    return text if row.agrees(record) else f"{record.call}{record.site}: {text}"


def _summary(row: Row, ranks: list[RankView]) -> str:
    """Ranks by what they did: of those that are done with the usual call, only which."""
    by_text: dict[str, list[int]] = {}
    for view in ranks:
        record = row.records.get(view.rank)
        done = record is not None and record.state is OperationState.DONE and row.agrees(record)
        by_text.setdefault("done" if done else _cell(row, view), []).append(view.rank)
    return "; ".join(f"{text}: {_ranges(of)}" for text, of in by_text.items())


def _ranges(numbers: Iterable[int]) -> str:
    """0-3, 7"""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _unfinished_messages(ranks: list[RankView]) -> Iterator[str]:
    for view in ranks:
        for record in view.records:
            if record.is_message and record.state is OperationState.RUNNING:
                yield f"rank {view.rank}: {record.call}{record.site}: {view.progress(record)}"


def _print_rank(console: Console, ranks: list[RankView], rank: int) -> int:
    view = next((view for view in ranks if view.rank == rank), None)
    if view is None:
        print(f"trace: there is no rank {rank} here.", file=sys.stderr)
        return 1
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("#", "queued", "group", "call", ""):
        table.add_column(title, overflow="fold")
    for record in view.records:
        clock = time.strftime("%H:%M:%S", time.localtime(record.queued_s + view.to_time_of_day_s))
        number = f" #{record.sequence}" if record.sequence else ""
        table.add_row(
            str(record.number),
            f"{clock}.{int(record.queued_s * 1000) % 1000:03d}",
            f"{record.group_name}{number}",
            f"{record.call}{record.site}",
            view.progress(record),
        )
    console.print(table)
    return 0
