"""The command line of train_elastic.py."""

import argparse
from pathlib import Path

from command_line import RankZeroParser, at_least

import pycomm

RULES = ("keep_global_batch", "scale_learning_rate", "none")


def parse_arguments() -> argparse.Namespace:
    parser = RankZeroParser(description="Train on handwritten digits, on ranks that come and go.")
    parser.add_argument("--epochs", type=at_least(1), default=15, help="until when to train")
    parser.add_argument(
        "--batch",
        type=at_least(pycomm.size()),
        default=64,
        help="images that all ranks together take each step",
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints go, and a job resumes from")
    parser.add_argument(
        "--rescale", choices=RULES, default=RULES[0], help="what changes with the number of ranks"
    )
    parser.add_argument(
        "--respawns", type=at_least(0), default=0, help="how many lost ranks are replaced"
    )
    parser.add_argument(
        "--kill-at",
        type=_kills,
        default=[],
        metavar="RANK:STEP,...",
        help="break down on purpose: these ranks, one after the other, in these steps",
    )
    return parser.parse_args()


def _kills(text: str) -> list[list[int]]:
    try:
        pairs = [list(map(int, pair.split(":"))) for pair in text.split(",")]
    except ValueError:
        pairs = [[]]
    if any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is not RANK:STEP,RANK:STEP,...")
    return pairs
