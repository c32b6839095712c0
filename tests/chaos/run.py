"""``python -m chaos.run --rounds 200 --seed 1``: breaks a job so often, and counts.

A run that was interrupted goes on where it was, unless the code has changed: rounds follow from the
seed. A round can be repeated alone: ``--only 17``.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cluster import what_is_missing
from rich.console import Console
from rich.table import Table

from chaos.kept import Kept, state_of_code
from chaos.plan import KINDS, Fault, fault_of
from chaos.rounds import run
from chaos.verdict import COUNTED, Outcome


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos.run", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stride", type=int, default=1, help="take every so many-th round")
    parser.add_argument("--only", type=int, metavar="ROUND", help="this one, whatever was done")
    parser.add_argument("--folder", type=Path, default=Path("../runs/chaos"))
    chosen = parser.parse_args(arguments)
    folder = chosen.folder.resolve() / f"seed-{chosen.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(soft_wrap=True, width=180)
    if chosen.only is not None:
        outcomes, left_out = _rounds(console, chosen.seed, [chosen.only], folder, None)
    else:
        numbers = range(0, chosen.rounds * chosen.stride, chosen.stride)
        kept = Kept(folder, state_of_code())
        if kept.why_anew:
            console.print(f"Starts anew: {kept.why_anew}.", highlight=False)
        outcomes, left_out = _rounds(console, chosen.seed, numbers, folder, kept)
        kept.finish()
    console.print(summary(outcomes))
    total = {what: sum(outcome.counts[what] for outcome in outcomes) for what in COUNTED}
    console.print(
        f"{len(outcomes)} rounds of seed {chosen.seed}, "
        f"{sum(outcome.happened for outcome in outcomes)} with a fault: "
        + ", ".join(f"{count} {what}" for what, count in total.items())
        + (f"; {left_out} left out" if left_out else ""),
        highlight=False,
    )
    return int(any(total.values()))


def _rounds(
    console: Console, seed: int, numbers: Sequence[int], folder: Path, kept: Kept | None
) -> tuple[list[Outcome], int]:
    """Those that are not kept already; and how many this machine cannot run."""
    former = {number: kept.outcome(number) for number in numbers} if kept else {}
    outcomes = [outcome for outcome in former.values() if outcome]
    if outcomes:
        console.print(f"{len(outcomes)} rounds were done before.", highlight=False)
    no_hosts = what_is_missing()
    left_out = 0
    for number in numbers:
        if former.get(number):
            continue
        fault = fault_of(seed, number)
        if no_hosts and fault.hosts > 1:
            console.print(f"{number:4} {fault}: left out: {no_hosts}", highlight=False)
            left_out += 1
            continue
        outcome = _round(fault, folder / str(number))
        if kept:
            kept.keep(number, outcome)
        outcomes.append(outcome)
        verdict = "; ".join(outcome.notes) or "ok"
        console.print(f"{number:4} {outcome.fault}: {verdict}", highlight=False, markup=False)
    return outcomes, left_out


def _round(fault: Fault, folder: Path) -> Outcome:
    """What a round that found something leaves stays in ``folder``, for whoever looks into it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        outcome = run(fault, Path(temporary))
        if outcome.notes:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(temporary, folder)
    return outcome


def summary(outcomes: Sequence[Outcome]) -> Table:
    """How soon the survivors heard of each kind of fault."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("fault", "rounds", "errors", "p50 s", "p99 s", "longest s", *COUNTED):
        table.add_column(title, justify="left" if title == "fault" else "right")
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.kind == kind]
        if not of_kind:
            continue
        seconds = [value for outcome in of_kind for value in outcome.seconds]
        counts = [str(sum(outcome.counts[what] for outcome in of_kind)) for what in COUNTED]
        table.add_row(kind, str(len(of_kind)), str(len(seconds)), *_percentiles(seconds), *counts)
    return table


def _percentiles(seconds: Sequence[float]) -> list[str]:
    if len(seconds) < 2:
        return [f"{value:.3f}" for value in seconds] * 3 or ["", "", ""]
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return [f"{cuts[49]:.3f}", f"{cuts[98]:.3f}", f"{max(seconds):.3f}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
