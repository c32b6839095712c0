"""``python -m chaos.run --rounds 200 --seed 1``: breaks a job so often, and counts.

The state of a run is kept in its folder, so that one that was interrupted goes on where it was:
rounds follow from the seed. A round can be repeated alone: ``--only 17``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cluster import what_is_missing
from rich.console import Console
from rich.table import Table

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
    numbers = range(0, chosen.rounds * chosen.stride, chosen.stride)
    if chosen.only is not None:
        numbers = range(chosen.only, chosen.only + 1)
    no_hosts = what_is_missing()
    left_out = 0
    console = Console(soft_wrap=True, width=160)
    outcomes: list[Outcome] = []
    for number in numbers:
        kept = folder / f"{number}.json"
        if kept.exists() and chosen.only is None:
            outcomes.append(Outcome(**json.loads(kept.read_text())))
            continue
        fault = fault_of(chosen.seed, number)
        if no_hosts and fault.hosts > 1:
            console.print(f"{number:4} {fault}: left out: {no_hosts}", highlight=False)
            left_out += 1
            continue
        outcome = _round(fault, folder / str(number))
        kept.write_text(json.dumps(asdict(outcome)))
        outcomes.append(outcome)
        verdict = "; ".join(outcome.notes) or "ok"
        console.print(f"{number:4} {outcome.fault}: {verdict}", highlight=False, markup=False)
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


def _round(fault: Fault, folder: Path) -> Outcome:
    """What a round that found something leaves stays in ``folder``, for whoever looks into it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        outcome = run(fault, Path(temporary))
        if outcome.notes:
            shutil.copytree(temporary, folder, dirs_exist_ok=True)
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
