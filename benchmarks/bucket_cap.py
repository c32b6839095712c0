"""Which bucket size makes a training step fastest? Chose ``DEFAULT_BUCKET_CAP_BYTES``.

mpirun -np 2 python benchmarks/bucket_cap.py

Trains a 10 M-parameter transformer with one wrapped optimizer for each bucket size, in interleaved
rounds, so that a noisy machine disturbs all sizes alike. Prints medians over the rounds: the whole
step, and the part of it that the training thread spent waiting for gradients.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

import pycomm
from pycomm.bench.ranks.step import TOKENS, WIDTH, transformer

MIB = 1 << 20
CAPS = [MIB // 4, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 64 * MIB]


class Contender:
    """One replica of the model whose gradients travel in buckets of one size."""

    def __init__(self, cap_bytes: int) -> None:
        self.model = transformer()
        self.optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=1e-4),
            self.model.named_parameters(),
            bucket_cap_bytes=cap_bytes,
        )
        self.step_seconds: list[float] = []
        self.wait_seconds: list[float] = []

    def step(self, batch: torch.Tensor) -> None:
        pycomm.barrier()
        waited = self.optimizer.wait_seconds
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.step_seconds.append(time.perf_counter() - started)
        self.wait_seconds.append(self.optimizer.wait_seconds - waited)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    pycomm.init()
    torch.set_num_threads(1)
    contenders = {cap: Contender(cap) for cap in CAPS}
    batch = torch.randn(args.batch, TOKENS, WIDTH)
    for contender in contenders.values():
        for _ in range(2):  # the first step only learns the order of the gradients
            contender.step(batch)
        contender.step_seconds.clear()
        contender.wait_seconds.clear()
    for _ in range(args.rounds):
        for contender in contenders.values():
            contender.step(batch)
    if pycomm.rank() == 0:
        table = Table("bucket_cap_bytes", "step ms", "waiting ms", title=f"{pycomm.size()} ranks")
        for cap, contender in contenders.items():
            step, wait = (
                f"{1e3 * statistics.median(seconds):.1f}"
                for seconds in (contender.step_seconds, contender.wait_seconds)
            )
            table.add_row(f"{cap / MIB:g} MiB", step, wait)
        Console().print(table)


if __name__ == "__main__":
    main()
