"""What torch's reducer starts in backward is run by the training thread, or by its keeper."""

import _thread
import functools
import re
import threading
import time

import pytest
import torch
from launchers import torchrun
from run_ranks import RankError, run_ranks
from torch import Tensor

from pycomm._core import DType, Group, ReduceOp
from pycomm.errors import MismatchError, PeerLostError
from pycomm.torch_backend.backward import Backward, Reduction, is_called_by_reducer


def start(backward: Backward, t: Tensor) -> Reduction:
    address = t.data_ptr()
    reduction = backward.all_reduce(
        address, address, t.numel(), DType.FLOAT32, ReduceOp.SUM, shape=t.shape
    )
    assert reduction is not None
    return reduction


def all_reduce(group: Group, t: Tensor) -> None:
    address = t.data_ptr()
    group.all_reduce(address, address, t.numel(), DType.FLOAT32, ReduceOp.SUM, shape=t.shape)


class During(torch.autograd.Function):
    """Calls a function in its backward."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.function()
        return gradient, None


def run_backward(*functions) -> None:
    """The functions run in this order, in one backward."""
    x = torch.ones(1, requires_grad=True)
    for function in reversed(functions):
        x = During.apply(x, function)
    x.sum().backward()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 100_000])
def test_reductions_are_over_when_backward_is(world_size, count):
    def rank(group: Group) -> list[Tensor]:
        tensors = [torch.full((count,), float(group.rank + 1 + i)) for i in range(3)]
        backward = None
        reductions = []

        def bucket(i: int) -> None:
            nonlocal backward
            backward = backward or Backward.begin(group)
            reductions.append(start(backward, tensors[i]))

        run_backward(lambda: bucket(0), lambda: bucket(1), lambda: bucket(2))
        assert backward.over and all(reduction.done() for reduction in reductions)
        all_reduce(group, tensors[0])  # the group is free again
        return tensors

    for tensors in run_ranks(world_size, rank):
        sums = [sum(r + 1 + i for r in range(world_size)) for i in range(3)]
        sums[0] *= world_size
        assert [t.unique().tolist() for t in tensors] == [[total] for total in sums]


def test_callbacks_come_once_before_backward_returns_and_at_once_afterwards():
    def rank(group: Group) -> list[str]:
        calls = []
        t = torch.ones(4)

        def bucket() -> None:
            backward = Backward.begin(group)
            start(backward, t).backward.when_over(lambda: calls.append(f"sum {t[0]:g}"))
            holder.append(backward)

        holder: list[Backward] = []
        run_backward(bucket)
        calls.append("returned")
        holder[0].when_over(lambda: calls.append("late"))
        holder[0].finish()
        return calls

    assert run_ranks(2, rank) == [["sum 2", "returned", "late"]] * 2


def test_a_keeper_goes_on_where_backward_computes_for_long():
    computed = threading.Event()

    def rank(group: Group) -> bool:
        t = torch.ones(50_000)
        if group.rank == 0:
            all_reduce(group, t)
            others_were_busy = not computed.is_set()
            assert t.unique().tolist() == [2.0]
            finished.set()
            return others_were_busy
        run_backward(
            lambda: start(Backward.begin(group), t),
            lambda: finished.wait(30),  # computes until the other rank has the sum
            computed.set,
        )
        return True

    finished = threading.Event()
    assert run_ranks(2, rank) == [True, True]
    assert finished.is_set() and computed.is_set()


def test_a_backward_that_raises_leaves_no_rank_waiting():
    def rank(group: Group) -> list[float]:
        t = torch.ones(50_000)
        if group.rank == 0:
            all_reduce(group, t)
        else:
            with pytest.raises(ZeroDivisionError):
                run_backward(lambda: start(Backward.begin(group), t), lambda: 1 / 0)
        again = torch.ones(2)
        deadline = time.monotonic() + 30
        while group.rank == 1 and t[0] != 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the keeper's work; this rank issues nothing meanwhile
        all_reduce(group, again)
        return [*t.unique().tolist(), *again.tolist()]

    assert run_ranks(2, rank) == [[2.0, 2.0, 2.0]] * 2


def test_backward_raises_the_error_and_so_does_whoever_waits():
    def rank(group: Group) -> None:
        t = torch.ones(4 + group.rank)
        reductions = []
        with pytest.raises(MismatchError) as of_backward:
            run_backward(lambda: reductions.append(start(Backward.begin(group), t)))
        assert reductions[0].done()
        with pytest.raises(MismatchError, match=re.escape(str(of_backward.value))):
            reductions[0].wait()
        raise of_backward.value

    with pytest.raises(RankError) as error:
        run_ranks(2, rank)
    assert isinstance(error.value.__cause__, MismatchError)


def test_a_busy_group_and_one_of_several_hosts_have_no_turn_to_give():
    def on_one_host(group: Group) -> None:
        def bucket() -> None:
            backward = Backward.begin(group)
            assert backward is not None
            assert Backward.begin(group) is None
            backward.finish()
            assert backward.all_reduce(0, 0, 0, DType.FLOAT32, ReduceOp.SUM) is None

        run_backward(bucket)

    run_ranks(2, on_one_host)

    def on_two(group: Group) -> None:
        run_backward(lambda: refused.append(Backward.begin(group)))

    refused: list[object] = []
    run_ranks(2, on_two, hosts=[0, 1])
    assert refused == [None, None]


def test_the_keeper_notices_that_a_peer_has_given_up():
    def rank(group: Group) -> str:
        if group.rank == 0:
            started.wait(30)
            group.abort("rank 0 gives up")
            return ""
        t = torch.ones(50_000)
        reductions = []

        def bucket() -> None:
            reductions.append(start(Backward.begin(group), t))
            started.set()

        def compute() -> None:
            deadline = time.monotonic() + 30
            while not reductions[0].done() and time.monotonic() < deadline:
                time.sleep(0.01)

        with pytest.raises(PeerLostError, match="rank 0 gives up") as error:
            run_backward(bucket, compute)
        return str(error.value)

    started = threading.Event()
    assert "rank 0 gives up" in run_ranks(2, rank)[1]


def test_a_call_without_a_python_frame_is_not_the_reducers():
    found = []
    _thread.start_new_thread(functools.partial(is_called_by_reducer, 50), ())
    found.append(is_called_by_reducer(10_000))
    run_backward(lambda: found.append(is_called_by_reducer(0)))  # a hook in Python
    assert found == [False, False]


POWER_SGD = """
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
dist.init_process_group("pycomm")
torch.manual_seed(0)
net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
model = torch.nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.02)
state = powerSGD_hook.PowerSGDState(
    None, matrix_approximation_rank=2, start_powerSGD_iter=3, min_compression_rate=1
)
model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for step in range(8):
    torch.manual_seed(100 * step + dist.get_rank())
    optimizer.zero_grad()
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
mine = torch.cat([param.detach().flatten() for param in net.parameters()])
theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(theirs, mine)
assert all(torch.equal(mine, their) for their in theirs)
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.timeout(150)
def test_a_hook_that_communicates_in_callbacks_takes_many_buckets():
    done = torchrun(2, POWER_SGD)
    assert done.returncode == 0, done.err
    assert done.out.count("equal") == 2
