"""The command line of train.py."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import pycomm

COMPRESSORS: dict[str, pycomm.compression.Compressor] = {
    "float16": pycomm.compression.Float16(),
    "int8": pycomm.compression.BlockwiseInt8(),
    "top-k": pycomm.compression.TopK(0.1),
}


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


parser = RankZeroParser(description="Train a small convolutional network on handwritten digits.")


def parse_arguments() -> argparse.Namespace:
    parser.add_argument("--epochs", type=_at_least(1), default=15, help="until when to train")
    parser.add_argument(
        "--batch",
        type=_at_least(pycomm.size()),
        default=64,
        help="images that all ranks together take each step",
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where run folders go")
    parser.add_argument(
        "--resume",
        metavar="PATH|latest",
        help="go on from a checkpoint.pt, or from the newest in DIR",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="train in float64, then again in one process, and compare",
    )
    parser.add_argument("--compress", choices=COMPRESSORS, help="send the gradients in fewer bytes")
    args = parser.parse_args()
    if args.verify and args.compress:
        parser.error("--verify compares with exact gradients, and --compress changes them")
    if args.verify and args.resume:
        parser.error("--verify repeats the whole training, so it cannot be combined with --resume")
    return args


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return value

    return parse
