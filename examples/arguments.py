"""The command line of train.py."""

import argparse

from command_line import RankZeroParser, add_run_options, at_least

import pycomm

COMPRESSORS: dict[str, pycomm.compression.Compressor] = {
    "float16": pycomm.compression.Float16(),
    "int8": pycomm.compression.BlockwiseInt8(),
    "top-k": pycomm.compression.TopK(0.1),
}

parser = RankZeroParser(description="Train a small convolutional network on handwritten digits.")


def parse_arguments() -> argparse.Namespace:
    parser.add_argument("--epochs", type=at_least(1), default=15, help="until when to train")
    parser.add_argument(
        "--batch",
        type=at_least(pycomm.size()),
        default=64,
        help="images that all ranks together take each step",
    )
    add_run_options(parser)
    parser.add_argument("--compress", choices=COMPRESSORS, help="send the gradients in fewer bytes")
    args = parser.parse_args()
    if args.verify and args.compress:
        parser.error("--verify compares with exact gradients, and --compress changes them")
    if args.verify and args.resume:
        parser.error("--verify repeats the whole training, so it cannot be combined with --resume")
    return args
