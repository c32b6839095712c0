"""The job that is broken: every phase of a training run, each result compared with the exact one.

    mpirun -np 4 python -m chaos.job FOLDER FAULT

Each rank writes what it sees to FOLDER/rank-R.jsonl, a line at a time, with the machine's steady
clock.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import no_compiler
import torch
from journal import Journal
from torch import nn

import pycomm
from chaos.plan import Fault
from chaos.victim import ChaosError, Victim, open_journal

CHECKPOINT = "checkpoint"  # in the folder of the round; saves have numbers, from 0
SAVED = torch.arange(500_000, dtype=torch.float32)

_PHASE_S = 0.8  # at least, so that faults of any delay find the phase


def repeat(step: Callable[[int], None], victim: Victim) -> None:
    """Until the phase is over on rank 0, which decides for all: the same number of steps."""
    began = time.monotonic()
    for number in range(10_000):
        victim.here()
        step(number)
        go_on = torch.tensor(int(time.monotonic() - began < _PHASE_S))
        pycomm.broadcast_(go_on, root=0)
        if not go_on:
            break
    victim.here()


def check(journal: Journal, what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        journal.write("wrong", what=what, found=str(found), expected=str(expected))


def train(journal: Journal, victim: Victim) -> None:
    rank, size = pycomm.rank(), pycomm.size()
    model = nn.ParameterDict(
        {f"w{i}": nn.Parameter(torch.zeros(50_000 if i else 7)) for i in range(4)}
    )
    optimizer = pycomm.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters()
    )

    def step(number: int) -> None:
        # The gradient of a parameter is what it is multiplied with: small integers, exact sums.
        scale = float(number % 11)
        optimizer.zero_grad()
        loss = torch.zeros(())
        for weight in model.values():
            loss = loss + (weight * (scale + rank)).sum()
        loss.backward()
        mean = scale + (size - 1) / 2
        for name, weight in model.items():
            assert weight.grad is not None
            check(journal, f"gradient of {name}", weight.grad, torch.full_like(weight, mean))
        optimizer.step()
        total = pycomm.all_reduce(torch.full((9,), number + rank))
        check(journal, "sum", total, torch.full((9,), size * number + size * (size - 1) // 2))

    repeat(step, victim)


def run_pipeline(journal: Journal, victim: Victim) -> None:
    size = pycomm.size()
    torch.manual_seed(1)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(size)))
    pipeline = pycomm.pipeline.Pipeline(layers, nn.functional.mse_loss, micro_batches=4)
    x, y = torch.randn(16, 64), torch.randn(16, 64)
    first: list[torch.Tensor] = []

    def step(number: int) -> None:
        for param in pipeline.parameters():
            param.grad = None
        loss = pipeline.step(x, y).detach()
        first.append(loss)
        check(journal, "loss", loss, first[0])

    repeat(step, victim)


def save_checkpoints(folder: Path, journal: Journal, victim: Victim) -> None:
    place = folder / CHECKPOINT

    def step(number: int) -> None:
        pycomm.checkpoint.save(place, {"state": SAVED, "number": number})
        journal.write("saved", number=number)
        loaded = pycomm.checkpoint.load(place, {"state": torch.zeros_like(SAVED), "number": -1})
        check(journal, "checkpoint", loaded["state"], SAVED)

    repeat(step, victim)


def warm_up() -> None:
    """What torch does when it is first used takes seconds: survivors are to be in their calls."""
    no_compiler.stand_in_for_it()
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    nn.functional.mse_loss(weight, torch.ones(3)).backward()
    optimizer.step()


def main(folder: Path, fault: Fault) -> None:
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    journal = open_journal(folder, rank)
    victim = Victim(fault, rank, journal)
    warm_up()
    try:
        victim.enter("start-up")
        if fault.phase == "start-up" and fault.rank == rank:
            time.sleep(fault.delay_s * 0.5)  # so that some faults come before, some in init()
            victim.here()
        pycomm.init()
        victim.here()
        for phase, work in (
            ("training", train),
            ("pipeline", run_pipeline),
        ):
            victim.enter(phase)
            work(journal, victim)
        victim.enter("checkpoint")
        save_checkpoints(folder, journal, victim)
        victim.enter("shutdown")
        victim.here()
        pycomm.shutdown()
        victim.here()
        journal.write("end")
    except ChaosError:
        raise
    except Exception as error:
        _tell(journal, error)
    except KeyboardInterrupt:
        journal.write("error", type="KeyboardInterrupt", text="")
        raise


def _tell(journal: Journal, error: Exception) -> NoReturn:
    typed = isinstance(error, pycomm.CommError)
    journal.write(
        "error",
        type=type(error).__name__,
        typed=typed,
        text=str(error),
        usable=getattr(error, "group_usable", None),
    )
    raise error


if __name__ == "__main__":
    main(Path(sys.argv[1]), Fault.decode(sys.argv[2]))
