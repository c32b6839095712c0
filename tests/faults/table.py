"""``make fault-table``: make every fault for real; what the ranks saw goes into docs/errors.md.

It fails if a rank was silent, hung, or saw something else than the list of faults says. ``--only``
makes the faults whose names contain a word, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import what_is_missing

from faults.every import FAULTS
from faults.render import table, write
from faults.runner import make_all
from faults.verdict import Row, problems

PAGE = Path(__file__).parents[2] / "docs/errors.md"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.table", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", metavar="WORD")
    chosen = parser.parse_args(arguments)
    faults = [fault for name, fault in FAULTS.items() if (chosen.only or "") in name]
    if not faults:
        parser.error(f"--only {chosen.only}: no fault has that in its name: {', '.join(FAULTS)}")
    if chosen.rounds < 1:
        parser.error(f"--rounds {chosen.rounds}: at least 1")
    missing = what_is_missing()
    if missing is not None and any(fault.hosts > 1 for fault in faults):
        print(f"fault-table: several hosts on this machine: {missing}", file=sys.stderr)
        return 2
    rows = {fault.name: Row(fault) for fault in faults}
    for number in range(chosen.rounds):
        for fault, seen in make_all(faults):
            row = rows[fault.name]
            before = len(row.problems)
            row.add(seen)
            found = "; ".join(row.problems[before:]) or "ok"
            print(f"round {number + 1}, {fault.name}: {found}", file=sys.stderr, flush=True)
    text = table(list(rows.values()))
    print(text)
    wrong = problems(list(rows.values()))
    if not wrong and chosen.only is None:
        write(PAGE, text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
