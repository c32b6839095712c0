"""The commands of ``python -m pycomm``, one a file."""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
from collections.abc import Sequence

from pycomm.cli import bench, info, plan, trace


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pycomm", description="Inspect pycomm.")
    parser.add_argument(
        "--version", action="version", version=f"pycomm {metadata.version('pycomm-torch')}"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser(
        "info", help="what is installed, and what this machine offers"
    ).set_defaults(run=lambda chosen: info.run())
    planner = commands.add_parser(
        "plan", help="which all-reduce runs, and what each would cost; a pipeline's timeline"
    )
    plan.add_arguments(planner)
    planner.set_defaults(run=plan.run)
    measurer = commands.add_parser("bench", help="pycomm, its peers and the machine, side by side")
    bench.add_arguments(measurer)
    measurer.set_defaults(run=bench.run)
    tracer = commands.add_parser("trace", help="what every rank did last, and where they part")
    trace.add_arguments(tracer)
    tracer.set_defaults(run=trace.run)
    chosen = parser.parse_args(arguments)
    return int(chosen.run(chosen))
