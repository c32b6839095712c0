"""The command line of train_gpt.py."""

import argparse

import gpt
from command_line import RankZeroParser, add_run_options, at_least

import pycomm
from pycomm.pipeline.schedule import SCHEDULES

parser = RankZeroParser(
    description="Train a small GPT on the sources of Python's standard library, byte by byte."
)


def parse_arguments() -> argparse.Namespace:
    """Every option; ``--dp`` is whatever the others leave unless it is given."""
    parser.add_argument("--dp", type=at_least(1), default=-1, help="replicas of the model")
    parser.add_argument("--pp", type=at_least(1), default=1, help="ranks that share its layers out")
    parser.add_argument("--tp", type=at_least(1), default=1, help="ranks that split each layer")
    parser.add_argument("--schedule", choices=SCHEDULES, default="1f1b", help="of the pipeline")
    parser.add_argument("--micro-batches", type=at_least(1), default=4, metavar="M")
    parser.add_argument("--zero", action="store_true", help="share the optimizer's state out")
    parser.add_argument("--steps", type=at_least(1), default=600, help="until when to train")
    parser.add_argument(
        "--every", type=at_least(1), default=100, metavar="STEPS", help="test and save so often"
    )
    parser.add_argument("--layers", type=at_least(1), default=4)
    parser.add_argument("--batch", type=at_least(1), default=32, help="passages a step, in all")
    add_run_options(parser)
    args = parser.parse_args()
    replicas, rest = divmod(pycomm.size(), args.pp * args.tp)
    if rest:
        parser.error(f"{pycomm.size()} ranks are no multiple of --pp {args.pp} x --tp {args.tp}")
    if args.dp not in (-1, replicas):
        parser.error(
            f"{pycomm.size()} ranks are not --dp {args.dp} x --pp {args.pp} x --tp {args.tp}"
        )
    args.dp = replicas
    if gpt.Shape.heads % args.tp:
        parser.error(f"--tp {args.tp} does not divide the {gpt.Shape.heads} heads of attention")
    if args.batch % args.dp:
        parser.error(f"--batch {args.batch} does not divide among {args.dp} replicas")
    if args.batch // args.dp < args.micro_batches:
        parser.error(
            f"--micro-batches {args.micro_batches} are more than the {args.batch // args.dp} "
            f"passages that each of {args.dp} replicas gets of --batch {args.batch}"
        )
    if args.verify and args.resume:
        parser.error("--verify repeats the whole training, so it cannot be combined with --resume")
    return args
