"""``python -m pycomm plan``: which all-reduce algorithm runs, and what each would cost.

``plan pipeline`` has a file of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from rich.console import Console
from rich.table import Table

from pycomm import _core, cost
from pycomm.cli import plan_pipeline
from pycomm.errors import InvalidArgumentError

MOST_RANKS = 100_000
MOST_BYTES = 1 << 44  # times MOST_RANKS it stays below 2**63


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    # Not required by the parser, which would then require them of "plan pipeline" too.
    parser.add_argument("--hosts", type=int, help="machines")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="processes on each (1)")
    parser.add_argument("--bytes", type=int, help="size of the tensor or bucket")
    names = [dtype.name.lower() for dtype in _core.DType if _core_reduces(dtype)]
    parser.add_argument(
        "--dtype", choices=names, default="float32", help="of the tensor (float32)", metavar="DTYPE"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    others = parser.add_subparsers(metavar="pipeline", title="instead of an all-reduce")
    pipeline = others.add_parser("pipeline", help="a pipeline schedule as a timeline")
    plan_pipeline.add_arguments(pipeline)
    pipeline.set_defaults(run=plan_pipeline.run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; 2 if an argument makes no sense."""
    problem = _problem(arguments)
    if problem is None:
        try:
            model = cost.load(os.environ)
        except InvalidArgumentError as error:
            problem = " ".join(str(error).split())
    if problem is not None:
        print(f"plan: {problem}", file=sys.stderr)
        return 2
    dtype = _core.DType[arguments.dtype.upper()]
    rows = _core.plan_all_reduce(
        model.to_core(),
        arguments.bytes // _element_bytes(dtype),
        dtype,
        arguments.hosts,
        arguments.ranks_per_host,
    )
    if arguments.json:
        print(json.dumps([{**row, "algorithm": _name(row["algorithm"])} for row in rows]))
        return 0
    table = Table("algorithm", "", "predicted", "messages", "bytes", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            _name(row["algorithm"]),
            "runs" if row["runs"] else "",
            _time(row["seconds"]),
            f"{row['messages']:,}",
            f"{row['bytes']:,}",
            style="bold" if row["runs"] else None,
        )
    console = Console(soft_wrap=True)
    console.print(
        f"all_reduce of {arguments.bytes:,} bytes of {arguments.dtype} over "
        f"{_count(arguments.hosts, 'host')} with {_count(arguments.ranks_per_host, 'rank')} each"
    )
    console.print(table)
    console.print("messages and bytes: what a host's first rank sends to other hosts")
    return 0


def _problem(arguments: argparse.Namespace) -> str | None:
    if arguments.hosts is None or arguments.bytes is None:
        return "an all-reduce needs --hosts and --bytes. A pipeline is `plan pipeline`."
    size = _element_bytes(_core.DType[arguments.dtype.upper()])
    if arguments.hosts < 1:
        return f"--hosts is {arguments.hosts}. Pass at least 1."
    if arguments.ranks_per_host < 1:
        return f"--ranks-per-host is {arguments.ranks_per_host}. Pass at least 1."
    if arguments.hosts * arguments.ranks_per_host > MOST_RANKS:
        return (
            f"--hosts {arguments.hosts} times --ranks-per-host {arguments.ranks_per_host} is "
            f"{arguments.hosts * arguments.ranks_per_host} ranks. Pass at most {MOST_RANKS} in all."
        )
    if arguments.bytes < 0 or arguments.bytes % size:
        return f"--bytes is {arguments.bytes}, no whole number of {arguments.dtype} ({size} bytes)."
    if arguments.bytes > MOST_BYTES:
        return f"--bytes is {arguments.bytes}. Pass at most {MOST_BYTES} (16 TiB)."
    return None


def _core_reduces(dtype: _core.DType) -> bool:
    return dtype.name != "BOOL" and not dtype.name.startswith("FLOAT8")


def _element_bytes(dtype: _core.DType) -> int:
    if dtype.name == "BFLOAT16":
        return 2
    bits = int("".join(character for character in dtype.name if character.isdigit()))
    return bits // 8


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _name(algorithm: _core.Algorithm) -> str:
    return "shared memory" if algorithm is _core.Algorithm.AUTO else algorithm.name.lower()


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
