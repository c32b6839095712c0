"""CUDA tensors where ranks are processes, on a double of CUDA and NCCL: no GPU has run any of this.

What ranks do as threads is in test_double_gpu.py; here it is little of everything, with one process
and one GPU of the double a rank, and a process that is killed.
"""

import re
import socket
import subprocess
from collections.abc import Iterator

import pytest
import torch
from double_gpu import (
    CALLERS,
    NCCLS,
    NOBODY,
    Double,
    doubles_in_place_of_gpus,
    from_gpu,
    module_on_gpu,
    on_gpu,
)
from launchers import TIMEOUT_S, process_options, python_command
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import pycomm
from pycomm import _core
from pycomm.errors import MismatchError
from pycomm.runtime import world_group

pytestmark = pytest.mark.skipif(
    _core.gpu_report(_core.GpuPlaces()).headers.startswith("not in this build"),
    reason="built without the headers of CUDA and NCCL",
)
starving = pytest.mark.parametrize("starved", [NOBODY, CALLERS, NCCLS])


@pytest.fixture
def double() -> Iterator[Double]:
    """Ranks of a job whose GPUs are the double's."""
    pycomm.shutdown()  # a job that has found its libraries keeps them
    with doubles_in_place_of_gpus() as double:
        pycomm.init()
        try:
            yield double
        finally:
            double.starve(NOBODY)
            pycomm.shutdown()


def whole(rank: int, *shape: int) -> Tensor:
    """Numbers whose sums and means over two or four ranks are exact in any order."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 8 * rank


def into(call, t: Tensor, shape: tuple[int, ...], group: _core.Group) -> Tensor:
    output = t.new_zeros(shape)
    call(output, t, group=group)
    return output


def uneven(group: _core.Group) -> list[int]:
    """How many of `2 p` rows go to each rank: none, and twice as many."""
    return [4 * (to % 2) for to in range(group.size)]


# Each takes a tensor of shape (2 p, 3) on the rank's device.
CASES = {
    "all_reduce": lambda t, group: pycomm.all_reduce(t, group=group),
    "all_reduce, averaged": lambda t, group: pycomm.all_reduce(t, pycomm.ReduceOp.AVG, group=group),
    "all_reduce later": lambda t, group: pycomm.all_reduce(t, group=group, async_op=True).wait(),
    "all_reduce_grouped": lambda t, group: pycomm.all_reduce_grouped(
        [t, t.narrow(0, 0, 2).double(), t.t()], group=group
    ),
    "broadcast": lambda t, group: pycomm.broadcast(t, 1, group=group),
    "reduce": lambda t, group: pycomm.reduce(t, 1, group=group),
    "all_gather": lambda t, group: pycomm.all_gather(t, group=group),
    "all_gather_list": lambda t, group: pycomm.all_gather_list(
        t.narrow(0, 0, 1 + group.rank), group=group
    ),
    "gather": lambda t, group: pycomm.gather(t, 1, group=group),
    "scatter_into": lambda t, group: into(
        pycomm.scatter_into, t.view(group.size, 2, 3), (2, 3), group
    ),
    "reduce_scatter": lambda t, group: pycomm.reduce_scatter(t, group=group),
    "all_to_all": lambda t, group: pycomm.all_to_all(t, group=group),
    "all_to_all, uneven": lambda t, group: pycomm.all_to_all(t, uneven(group), group=group),
}


@pytest.mark.mpi
@starving
def test_double_collectives_of_processes_give_what_they_give_on_the_host(double, starved):
    group = world_group()
    double.starve(starved)
    for name, call in CASES.items():
        on_host = call(whole(group.rank, 2 * group.size, 3), group)
        on_double = call(on_gpu(whole(group.rank, 2 * group.size, 3), group.rank), group)
        found = tree_map_only(Tensor, from_gpu, on_double)
        torch.testing.assert_close(
            found, on_host, rtol=0, atol=0, msg=lambda m, name=name: name + m
        )


@pytest.mark.mpi
@starving
def test_double_messages_of_processes(double, starved):
    group = world_group()
    double.starve(starved)
    following, previous = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    received = on_gpu(torch.zeros(1000), group.rank)
    works = [
        pycomm.isend(on_gpu(whole(group.rank, 1000), group.rank), following, group=group),
        pycomm.irecv(received, previous, group=group),
    ]
    for work in works:
        work.wait()
    assert torch.equal(from_gpu(received), whole(previous, 1000))


def train(net: nn.Module, group: _core.Group, place) -> list[Tensor]:
    """Steps whose gradients are set by hand: torch's autograd wants a real GPU for CUDA tensors."""
    optimizer = pycomm.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5),
        net.named_parameters(),
        group=group,
        bucket_cap_bytes=128,
    )
    for step in range(3):
        optimizer.zero_grad()
        for number, param in enumerate(net.parameters()):
            if number == 3 and (step == 1 or group.rank == 1):
                continue  # used by some ranks, or by none
            param.grad = place(whole(group.rank, *param.shape) + step + number)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.mpi
@starving
def test_double_gradients_of_processes_give_the_bits_they_give_on_the_host(double, starved):
    # Of these numbers NCCL's sum of parts is the part of the sum.
    group = world_group()
    double.starve(starved)
    on_host = train(model(), group, lambda t: t)
    on_double = train(module_on_gpu(model(), group.rank), group, lambda t: on_gpu(t, group.rank))
    assert all(torch.equal(a, from_gpu(b)) for a, b in zip(on_host, on_double, strict=True))


@pytest.mark.mpi
def test_double_a_work_without_its_wait_is_seen_to_be_wrong_on_a_process(double):
    group = world_group()
    t = on_gpu(whole(group.rank, 1000), group.rank)
    double.starve(NCCLS)
    double.forget("cudaStreamWaitEvent", CALLERS)
    try:
        total = pycomm.all_reduce(t, group=group, async_op=True).wait()
        found = total._inner.clone()  # what its stream, which has nothing to wait for, would read
    finally:
        double.forget("", 0)
    right = sum(whole(rank, 1000) for rank in range(group.size))
    wrong = pycomm.all_reduce(torch.tensor(int(not torch.equal(found, right))), group=group)
    assert wrong.item() > 0


@pytest.mark.mpi
def test_double_a_mismatch_is_found_on_every_process(double):
    group = world_group().duplicate()
    t = on_gpu(whole(group.rank, 8), group.rank)
    pycomm.all_reduce(t, group=group)
    with pytest.raises(MismatchError, match=r"(?s)all_reduce of 7 float32, .*, on GPUs"):
        pycomm.all_reduce(t.narrow(0, 0, 7) if group.rank == 1 else t, group=group)
    on_host = pycomm.all_reduce(torch.ones(1))  # in another group
    assert on_host.item() == group.size


# --- a process that is killed ---------------------------------------------------------------------


# Rank 1 dies with its GPU in a call, which the others' GPUs have begun, or before it came to one.
JOB = """
    import os, pathlib, signal, sys, time
    import torch
    import pycomm
    from double_gpu import doubles_in_place_of_gpus, from_gpu, on_gpu, open_files

    when, came = sys.argv[1], pathlib.Path(sys.argv[2])
    with doubles_in_place_of_gpus() as double:
        pycomm.init()
        rank = pycomm.rank()
        t = on_gpu(torch.ones(8), rank)
        if when != "message launched":
            pycomm.all_reduce_(t)
            assert from_gpu(t)[0] == pycomm.size()
            assert open_files() == 2
            pycomm.barrier()
        (came / str(rank)).touch()
        if rank == 1:
            deadline = time.monotonic() + 60
            while len(list(came.iterdir())) < 3:  # else they may still be in the sum
                assert time.monotonic() < deadline, "another rank did not come"
                time.sleep(0.01)
            double.hold(1, when != "not launched")
            if when == "sum launched":
                pycomm.all_reduce_(t, async_op=True).wait()
            if when == "message launched":
                pycomm.isend(t, 0).wait()
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                if when == "message launched":
                    pycomm.recv(t, 1)
                else:
                    pycomm.all_reduce_(t)
                double.synchronize(rank)  # would wait for ever for the kernel
        except pycomm.PeerLostError as error:
            print("raised", error)
        while open_files() > 1:  # the communicator's is closed by another thread
            time.sleep(0.01)
        print("left with its memory")
        sys.stdout.flush()
        os._exit(0)
"""

SUM = r"all_reduce of 8 float32, shape \(8,\), SUM, on GPUs \(call #\d+[^)]*\)"
RECV = r"recv of 8 float32, shape \(8,\), on a GPU, from rank 1, tag 0"


@pytest.mark.parametrize(
    ("when", "call"), [("not launched", SUM), ("sum launched", SUM), ("message launched", RECV)]
)
def test_double_a_killed_process_is_a_lost_peer(when, call, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # No launcher, which would end the others.
    ranks = [
        subprocess.Popen(
            python_command(JOB, when, str(tmp_path)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **process_options(
                RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            ),
        )
        for rank in range(3)
    ]
    try:
        ended = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9
    for number in (0, 2):
        out, err = ended[number]
        assert ranks[number].returncode == 0, out + err
        assert "left with its memory" in out
        assert re.search(rf"raised {call}.* on rank \d: rank 1 is gone", out), out
