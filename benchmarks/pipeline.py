"""What pipelines are made of, against the peers, in interleaved rounds of one run.

mpirun -np 2 python benchmarks/pipeline.py

- One activation from rank to rank, there and back, halved: through a pipeline's slots, through
  torch.distributed's send and recv on gloo, and through Send and Recv of mpi4py.
- A training step of two tiny stages: pycomm's 1F1B, and torch.distributed.pipelining's
  Schedule1F1B on gloo. What both have in common, the stages' own forward and backward passes, is
  measured by itself, on both ranks at once.

Prints medians in microseconds. ``--only-mpi4py`` needs NumPy and mpi4py alone: for other MPIs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
from mpi4py import MPI

MIB = 1 << 20
REPEATS = 10
TIMES: dict[str, list[float]] = {}


def timed(name: str, action: Callable[[], object]) -> None:
    """Both ranks begin together; what counts is rank 0's time until it is over. A few times in a
    row: right after another library's turn each finds its threads and caches about.
    """
    for _ in range(REPEATS):
        MPI.COMM_WORLD.Barrier()
        started = time.perf_counter()
        action()
        TIMES.setdefault(name, []).append(time.perf_counter() - started)


def median_us(name: str, skip: int) -> float:
    return statistics.median(TIMES[name][skip:]) * 1e6


def mpi4py_round_trip() -> Callable[[], None]:
    comm, memory = MPI.COMM_WORLD, np.zeros(MIB, dtype=np.uint8)

    def round_trip() -> None:
        for sender in (0, 1):
            if comm.rank == sender:
                comm.Send(memory, 1 - sender)
            else:
                comm.Recv(memory, sender)

    return round_trip


def only_mpi4py(rounds: int) -> None:
    round_trip = mpi4py_round_trip()
    for _ in range(rounds):
        timed("mpi4py", round_trip)
    if MPI.COMM_WORLD.rank == 0:
        version = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0")
        print(f"1 MiB one way: mpi4py on {version} {median_us('mpi4py', 2 * REPEATS) / 2:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--width", type=int, default=8, help="of the tiny stages' linear layer")
    parser.add_argument("--only-mpi4py", action="store_true")
    arguments = parser.parse_args()
    if MPI.COMM_WORLD.size != 2:
        raise SystemExit("start it on two ranks: mpirun -np 2 python benchmarks/pipeline.py")
    if arguments.only_mpi4py:
        only_mpi4py(arguments.rounds)
        return

    import warnings

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    import pycomm
    from pycomm.pipeline.transfers import RemoteInlet, RemoteOutlet
    from pycomm.runtime import group_of

    warnings.filterwarnings("ignore")  # of torch.distributed, about batched messages
    pycomm.init()
    torch.set_num_threads(1)
    rank, rounds = pycomm.rank(), arguments.rounds
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(MPI.COMM_WORLD.bcast(29500 + os.getpid() % 10000))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    dist.barrier()  # which connects them

    # --- an activation ---
    group, host = group_of(None).duplicate(), torch.device("cpu")
    outlet = RemoteOutlet(group, 1 - rank, 3 * rank, torch.device("cpu"))
    inlet = RemoteInlet(group, 1 - rank, 3 * (1 - rank), 2, host)
    activation = torch.randn(MIB // 4)
    received = torch.empty_like(activation)

    number = itertools.count()

    def slots() -> None:
        micro_batch = next(number)
        if rank == 0:
            outlet.send(activation, micro_batch)
        inlet.receive(micro_batch)
        inlet.release()
        if rank == 1:
            outlet.send(activation, micro_batch)

    def gloo() -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(activation, 1 - sender)
            else:
                dist.recv(received, sender)

    mpi4py = mpi4py_round_trip()
    for _ in range(rounds):
        outlet.begin(REPEATS)
        inlet.begin(REPEATS)
        timed("slots", slots)
        outlet.settle()
        timed("gloo", gloo)
        timed("mpi4py", mpi4py)
    ours, theirs, mpis = (median_us(name, 2 * REPEATS) / 2 for name in ("slots", "gloo", "mpi4py"))
    if rank == 0:
        print(
            f"1 MiB one way: pycomm {ours:.1f} us, gloo {theirs:.1f} us ({theirs / ours:.1f} x), "
            f"mpi4py {mpis:.1f} us ({mpis / ours:.1f} x)"
        )

    # --- a step ---
    micro_batches, width = 8, arguments.width
    x, y = torch.randn(64, width), torch.randn(64, width)
    mse = nn.functional.mse_loss
    stages = [nn.Linear(width, width) for _ in range(2)]
    pipeline = pycomm.pipeline.Pipeline(stages, mse, micro_batches=micro_batches)
    stage = nn.Linear(width, width)
    schedule = Schedule1F1B(PipelineStage(stage, rank, 2, host), micro_batches, loss_fn=mse)
    alone = nn.Linear(width, width)

    def compute() -> None:
        for part, target in zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True):
            output = alone(part.detach().requires_grad_())
            if rank == 1:
                torch.autograd.backward(mse(output, target))
            else:
                torch.autograd.backward(output, output.detach())

    def step_of_torch() -> None:
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])

    def together(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            action()
            MPI.COMM_WORLD.Barrier()

        return run

    for _ in range(rounds):
        for module in (pipeline.module, stage, alone):
            module.zero_grad()
        timed("pycomm's step", together(lambda: pipeline.step(x, y)))
        timed("gloo's step", together(step_of_torch))
        timed("compute", together(compute))
    ours, theirs, common = (
        median_us(n, 2 * REPEATS) for n in ("pycomm's step", "gloo's step", "compute")
    )
    if rank == 0:
        print(
            f"step of 2 tiny stages, 8 micro-batches: pycomm {ours:.0f} us, Schedule1F1B on gloo "
            f"{theirs:.0f} us (ratio {ours / theirs:.2f}); the stages alone {common:.0f} us"
        )
    dist.destroy_process_group()
    pycomm.shutdown()


if __name__ == "__main__":
    main()
