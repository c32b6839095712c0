"""What trainers ask of torch.distributed and hand-written loops do not; found with real ones.

tests/test_real_programs.py runs the trainers themselves, where they are installed.
"""

import subprocess
import sys

import launchers
import pytest

pytestmark = pytest.mark.timeout(150)


def test_integers_are_averaged_towards_zero():
    """Lightning averages its counts of samples, on any backend but gloo."""
    script = """
    import itertools, torch, torch.distributed as dist
    dist.init_process_group("pycomm")
    rank, size = dist.get_rank(), dist.get_world_size()
    AVG = dist.ReduceOp.AVG
    for dtype, asynchronous in itertools.product(
        [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], [False, True]
    ):
        for low in [3, -4] if dtype.is_signed else [3]:  # sums of 10 and -11
            mine, mean = low + (rank == 2), -3 if low < 0 else 3

            def summands(*shape):
                return torch.full(shape, mine, dtype=dtype)

            def over(work):
                if asynchronous:
                    work.wait()

            t = summands(5)
            over(dist.all_reduce(t, op=AVG, async_op=asynchronous))
            assert t.tolist() == 5 * [mean], (dtype, low, t)
            t = summands(5)
            over(dist.reduce(t, 1, op=AVG, async_op=asynchronous))
            assert t.tolist() == 5 * [mean if rank == 1 else mine], (dtype, low, t)
            t = torch.empty(5, dtype=dtype)
            over(dist.reduce_scatter(t, [summands(5)] * size, op=AVG, async_op=asynchronous))
            assert t.tolist() == 5 * [mean], (dtype, low, t)
            t = torch.empty(rank + 1, dtype=dtype)
            blocks = [summands(r + 1) for r in range(size)]
            over(dist.reduce_scatter(t, blocks, op=AVG, async_op=asynchronous))
            assert t.tolist() == (rank + 1) * [mean], (dtype, low, t)
    t = torch.tensor(rank)
    (averaged,) = dist.all_reduce(t, op=AVG, async_op=True).get_future().wait()
    assert averaged.item() == t.item() == 1
    dist.destroy_process_group()
    """
    done = launchers.torchrun(3, script)
    assert done.returncode == 0, done.out + done.err


def test_what_is_no_average():
    """Booleans have none. Of integers it is a sum on the wire, and yet none for other ranks."""
    script = """
    import torch, torch.distributed as dist
    from pycomm import InvalidArgumentError, MismatchError
    dist.init_process_group("pycomm")
    def refusal(dtype, op):
        try:
            dist.all_reduce(torch.ones(2, dtype=dtype), op=op)
        except (InvalidArgumentError, MismatchError) as error:
            return f"{type(error).__name__}: {error}"
    said = refusal(torch.bool, dist.ReduceOp.AVG)
    assert "AVG needs a floating dtype, and tensor has torch.bool" in said, said
    said = refusal(torch.int64, dist.ReduceOp.AVG if dist.get_rank() else dist.ReduceOp.SUM)
    assert said.startswith("MismatchError: call #1 differs: rank"), said
    assert "average of integers" in said, said
    """
    done = launchers.torchrun(2, script)
    assert done.returncode == 0, done.out + done.err


def test_a_rank_that_torch_tells_counts():
    """Lightning starts its ranks itself and sets WORLD_SIZE, and RANK for none of them."""
    script = """
    import os, subprocess, sys, tempfile, torch, torch.distributed as dist
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank == 0:
        os.environ["MEET"] = tempfile.mktemp()
        other = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env={**os.environ, "LOCAL_RANK": "1"}
        )
    os.environ["WORLD_SIZE"] = "2"
    dist.init_process_group(
        "pycomm", init_method=f"file://{os.environ['MEET']}", rank=rank, world_size=2
    )
    t = torch.ones(3)
    dist.all_reduce(t)
    assert t.tolist() == [2, 2, 2]
    dist.destroy_process_group()
    if rank == 0:
        assert other.wait() == 0
    """
    done = launchers.alone(script)
    assert done.returncode == 0, done.out + done.err


def test_a_port_alone_is_no_place_to_meet():
    """Accelerate under mpirun sets MASTER_PORT to 29500, and no MASTER_ADDR."""
    script = """
    import os, torch, torch.distributed as dist
    os.environ["MASTER_PORT"] = "29500"
    dist.init_process_group("pycomm")
    t = torch.ones(3)
    dist.all_reduce(t)
    assert t.tolist() == [2, 2, 2]
    dist.destroy_process_group()
    """
    done = launchers.mpirun(2, script)
    assert done.returncode == 0, done.out + done.err


def test_ranks_are_known_before_a_trainer_is_imported():
    """Ultralytics reads these three when it is imported, and never again."""
    script = """
    import torch, os
    print("ranks", *(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    """
    done = launchers.mpirun(2, script)
    assert done.returncode == 0, done.err
    assert sorted(line for line in done.out.splitlines() if "ranks" in line) == [
        "ranks 0 0 2",
        "ranks 1 1 2",
    ]


@pytest.mark.parametrize("launch", [launchers.torchrun, launchers.mpirun])
def test_many_small_calls_of_many_kinds(launch):
    """Ultralytics, each epoch: buffers one by one, losses reduced one by one, objects, barriers."""
    script = """
    import torch, torch.distributed as dist
    from torch import nn
    dist.init_process_group("pycomm")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Sequential(*(nn.BatchNorm2d(8) for _ in range(100)))
    for _ in range(3):
        model(torch.randn(2, 8, 4, 4))
        for buffer in model.buffers():  # means, variances, and counts: int64 without dimensions
            dist.broadcast(buffer, src=0)
        for value in torch.arange(4.0):
            loss = value + rank
            dist.reduce(loss, dst=0, op=dist.ReduceOp.AVG)
            assert loss == (value + 0.5 if rank == 0 else value + 1)
        box = [rank == 0 or None]
        dist.broadcast_object_list(box, 0)
        assert box == [True]
        dist.barrier(async_op=False, device_ids=None)
        dist.barrier(group=dist.group.WORLD)
        assert dist.barrier(async_op=True).wait()
    mine = nn.utils.parameters_to_vector(b.double() for b in model.buffers())
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    assert torch.equal(*theirs)
    dist.destroy_process_group()
    """
    done = launch(2, script)
    assert done.returncode == 0, done.out + done.err


WORKERS = """
import torch, torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        return torch.tensor(float(index)) ** 2

if __name__ == "__main__":
    dist.init_process_group("pycomm")
    for epoch in range(2):
        for batch in DataLoader(Squares(), 8, num_workers=2, multiprocessing_context=METHOD):
            dist.all_reduce(batch)
    assert batch.tolist() == [2 * x**2 for x in range(56, 64)]
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("method", "launcher"),
    [("fork", "torchrun"), ("fork", "mpirun"), ("forkserver", "torchrun"), ("spawn", "mpirun")],
)
def test_workers_that_load_data_beside_a_group(tmp_path, method, launcher):
    """Started after the group, by a fork of it or by a new process that imports the script."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS.replace("METHOD", repr(method)))
    command = {"torchrun": launchers.torchrun_command, "mpirun": launchers.mpirun_command}
    done = subprocess.run(
        [*command[launcher](2), sys.executable, str(script)],
        capture_output=True,
        timeout=120,
        **launchers.process_options(),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_starts_nothing():
    """A server of forks imports it, and so does each process that it starts."""
    script = """
    import os, threading, torch, pycomm, pycomm.torch_backend
    assert threading.active_count() == 1
    assert "mpi4py" not in __import__("sys").modules
    torch.distributed.is_available()
    tasks = os.listdir("/proc/self/task")
    assert len(tasks) == 1, tasks
    """
    done = launchers.alone(script)
    assert done.returncode == 0, done.out + done.err
    done = launchers.mpirun(2, script)
    assert done.returncode == 0, done.out + done.err
