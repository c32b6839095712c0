"""What the examples' command lines have in common."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pycomm


class RankZeroParser(argparse.ArgumentParser):
    """Every rank parses the same command line; only rank 0 speaks, and all leave together."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if pycomm.rank() == 0:
            super()._print_message(message, file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        if message:
            self._print_message(message, sys.stderr)
        pycomm.shutdown()
        sys.exit(status)


def at_least(least: int) -> Callable[[str], int]:
    """What an argument may be."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return value

    return parse


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Where a run goes, and what it goes on from."""
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders go")
    parser.add_argument(
        "--resume", metavar="PATH|latest", help="go on from a run's folder, or from the newest"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="train in float64, then again in one process, and compare",
    )
