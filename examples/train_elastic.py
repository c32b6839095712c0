"""Train the network of train.py, and go on when ranks are killed.

mpirun --with-ft ulfm -np 4 python examples/train_elastic.py
"""

import os
import signal
import time
from typing import Any

import torch
from elastic_arguments import parse_arguments
from torch import nn
from torch.utils.data import DataLoader
from train import accuracy, build_model, build_optimizer, build_schedule, load_data

import pycomm


def main() -> None:
    pycomm.init()
    torch.set_num_threads(1)  # every rank has a core; more threads would fight for them
    args = parse_arguments()
    train_set, test_set = load_data()

    model = build_model()
    optimizer = build_optimizer(model)
    state = pycomm.elastic.State(
        folder=args.folder,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer),
        sampler=pycomm.elastic.Sampler(train_set, args.batch),
        step=0,
        kills=args.kill_at,
        ranks=pycomm.size(),
        wanted=pycomm.size(),
    )

    def train(state: pycomm.elastic.State) -> None:
        # Everything that belongs to the ranks there are now is made here.
        optimizer = pycomm.DistributedOptimizer(state.optimizer, state.model.named_parameters())
        loader: DataLoader[tuple[torch.Tensor, ...]] = DataLoader(
            train_set, batch_sampler=state.sampler
        )
        note_kills(state)
        while state.sampler.epoch < args.epochs:
            losses = []
            for images, labels in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(state.model(images), labels)
                (state.sampler.weight * loss).backward()
                break_down(state, args.respawns > 0)
                optimizer.step()
                losses.append(loss.detach())
                state.step = state.step + 1
                if state.sampler.advance():  # that was the epoch's last step
                    state.schedule.step()
                state.commit()
            mean_loss = float(pycomm.all_reduce(torch.stack(losses).mean(), pycomm.ReduceOp.AVG))
            if pycomm.rank() == 0:
                ranks = pycomm.size()
                print(f"epoch {state.sampler.epoch:2d}: loss {mean_loss:.4f}, {ranks} ranks")

    pycomm.elastic.run(train, state, rescale=args.rescale, respawns=args.respawns)
    result = accuracy(model, test_set)
    if pycomm.rank() == 0:
        print(f"test accuracy {result:.2%} after {args.epochs} epochs on {pycomm.size()} ranks")


# --- what --kill-at does ---------------------------------------------------------------------


def note_kills(state: Any) -> None:
    """The kills that have happened are over: each rank that is missing was one."""
    happened = max(0, state.ranks - pycomm.size())
    state.kills = state.kills[happened:]
    state.ranks = pycomm.size()


def break_down(state: Any, replaced: bool) -> None:
    """End this process if it is its turn: not before another one has replaced the last one."""
    if not state.kills:
        return
    if replaced and pycomm.size() < state.wanted:
        time.sleep(0.1)  # leave some of the training to the replacement
        return
    rank, step = state.kills[0]
    if state.step >= step and pycomm.rank() == rank:
        print(f"rank {rank} is killed in step {state.step}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
