"""Elastic training that loses ranks: what each rank commits, and which samples it has taken.

    mpirun --with-ft ulfm -np 4 python -m chaos.elastic_job FOLDER FAULT

Whoever reads the notes compares what ranks have committed at each step.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import pycomm
from chaos.job import warm_up
from chaos.plan import Fault
from chaos.victim import Victim, open_journal

SAMPLES, BATCH, EPOCHS = 400, 20, 24  # on idle cores longer than the latest fault


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    for values in (model.state_dict(), optimizer.state_dict()["state"]):
        found.update(repr(values).encode())
    return found.hexdigest()[:16]


def main(folder: Path, fault: Fault) -> None:
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    journal = open_journal(folder, rank)
    victim = Victim(fault, rank, journal)
    warm_up()
    torch.set_printoptions(precision=17)
    data = TensorDataset(torch.arange(SAMPLES))
    model = torch.nn.Linear(1, 1)
    state = pycomm.elastic.State(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        sampler=pycomm.elastic.Sampler(data, BATCH),
        step=0,
        taken=torch.zeros(EPOCHS, SAMPLES, dtype=torch.int32),  # how often, by committed steps
    )
    entered = False

    def train(state: pycomm.elastic.State) -> None:
        nonlocal entered
        journal.write("resume", step=state.step, size=pycomm.size())
        if not entered:
            victim.enter("elastic")
        entered = True
        optimizer = pycomm.DistributedOptimizer(state.optimizer, state.model.named_parameters())
        loader = DataLoader(data, batch_sampler=state.sampler)
        while state.sampler.epoch < EPOCHS:
            for (numbers,) in loader:
                optimizer.zero_grad()
                loss = (state.model(numbers[:, None] / SAMPLES) ** 2).mean()
                (state.sampler.weight * loss).backward()
                optimizer.step()
                taken = torch.zeros(SAMPLES, dtype=torch.int32)
                taken[numbers] = 1
                pycomm.all_reduce_(taken)
                state.taken[state.sampler.epoch] += taken
                state.sampler.advance()
                state.step = state.step + 1
                state.commit()
                journal.write(
                    "commit", step=state.step, digest=digest(state.model, state.optimizer)
                )

    pycomm.elastic.run(train, state)
    if not bool((state.taken == 1).all()):
        journal.write("wrong", what="samples", found=str(state.taken.unique()), expected="1")
    journal.write("end", step=state.step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Fault.decode(sys.argv[2]))
