"""What do ``check_finite`` and ``verify`` cost? Behind docs/adr/0021 and benchmarks/README.md.

mpirun -np 2 python benchmarks/checks.py

Makes steps with the parameters of a 10 M-parameter transformer, whose gradients cost next to
nothing to compute, with one wrapped optimizer for each check, in interleaved rounds, so that a
noisy machine disturbs all alike. Prints of the rounds the median and the fastest on the clock, and
the median of the processor time, which other programs disturb less. ``--without-checks`` takes only
what older versions have, to compare two builds.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pycomm
from pycomm.bench.ranks.step import transformer

CHECKS: dict[str, dict[str, Any]] = {
    "none": {},
    "none, again": {},
    "check_finite": {"check_finite": "error"},
    "verify every step": {"verify": "checksum", "verify_every": 1},
}


class Contender:
    """One replica of the model, with one check, whose gradients autograd makes or adds up."""

    def __init__(self, options: dict[str, Any], set_to_none: bool) -> None:
        self.model = transformer()
        pycomm.broadcast_parameters(self.model)
        self.optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=1e-4),
            self.model.named_parameters(),
            **options,
        )
        self.set_to_none = set_to_none
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def step(self) -> None:
        self.optimizer.zero_grad(self.set_to_none)
        loss = sum((p * 2).sum() for p in self.model.parameters())
        pycomm.barrier()
        started, processor_started = time.perf_counter(), time.process_time()
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        self.processor_seconds.append(time.process_time() - processor_started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without-checks", action="store_true")
    args = parser.parse_args()
    pycomm.init()
    torch.set_num_threads(1)
    checks = {name: of for name, of in CHECKS.items() if not (args.without_checks and of)}
    contenders = {name: Contender(of, True) for name, of in checks.items()}
    contenders |= {f"{name}; added up": Contender(of, False) for name, of in checks.items()}
    for contender in contenders.values():
        for _ in range(2):  # the first step only learns the order of the gradients
            contender.step()
        contender.seconds.clear()
        contender.processor_seconds.clear()
    for _ in range(args.rounds):
        for contender in contenders.values():
            contender.step()
    if pycomm.rank() == 0:
        table = Table("", "step ms", "fastest", "processor ms", title=f"{pycomm.size()} ranks")
        for name, contender in contenders.items():
            numbers = (
                statistics.median(contender.seconds),
                min(contender.seconds),
                statistics.median(contender.processor_seconds),
            )
            table.add_row(name, *(f"{1e3 * number:.1f}" for number in numbers))
        Console().print(table)


if __name__ == "__main__":
    main()
