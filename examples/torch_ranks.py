"""What the examples on torch.distributed have in common."""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from command_line import at_least


def new_parser(description: str, *, epochs: int) -> argparse.ArgumentParser:
    """With the options that all these examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--epochs", type=at_least(1), default=epochs)
    parser.add_argument("--backend", default="pycomm", help="of torch.distributed: pycomm, gloo")
    return parser


def parse_on_ranks(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, if a launcher has started several ranks."""
    args = parser.parse_args()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        parser.error("there is one rank: use torchrun --nproc-per-node 2, or mpirun -np 2 python")
    return args


def mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def checksum(weights: Iterable[torch.Tensor]) -> str:
    """Of every bit: two ranks have the same one only if they have the same weights."""
    digest = hashlib.sha256()
    for tensor in weights:
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def conclude(result: str, reached: bool, weights: Iterable[torch.Tensor]) -> None:
    """Say on rank 0 what was reached; leave with 1 if it is too little or ranks disagree."""
    checksums = [""] * dist.get_world_size()
    dist.all_gather_object(checksums, checksum(weights))
    agree = len(set(checksums)) == 1
    if dist.get_rank() == 0:
        ranks = f"{len(checksums)} ranks on {dist.get_backend()}"
        verdict = f"equal, checksum {checksums[0]}" if agree else "DIFFERENT"
        poor = "" if reached else "; RESULT TOO POOR"
        print(f"{result}; weights of {ranks} {verdict}{poor}", flush=True)
    dist.destroy_process_group()
    if not (agree and reached):
        sys.exit(1)
