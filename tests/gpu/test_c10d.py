"""torch.distributed on pycomm with CUDA tensors: works, futures and DistributedDataParallel."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

import pycomm

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def process_group(world: None) -> Iterator[None]:
    dist.init_process_group("pycomm")
    yield
    dist.destroy_process_group()


def ranks_sum(value: int) -> float:
    return float(sum(rank + value for rank in range(pycomm.size())))


@pytest.mark.parametrize("count", [1, 1000, 3_000_000])
def test_blocking_and_asynchronous_sums(device, count):
    for step in range(3):
        t = torch.full((count,), float(pycomm.rank() + step), device=device)
        u, v = t.clone(), t.clone()
        dist.all_reduce(t)
        work = dist.all_reduce(u, async_op=True)
        future = dist.all_reduce(v, async_op=True).get_future()
        doubled = future.then(lambda settled: settled.value()[0] * 2)
        work.wait()
        future.wait()
        expected = ranks_sum(step)
        assert t.unique().tolist() == u.unique().tolist() == v.unique().tolist() == [expected]
        assert doubled.wait().unique().tolist() == [2 * expected]


def test_lists_and_blocks(device):
    rank, size = pycomm.rank(), pycomm.size()
    mine = torch.full((5,), float(rank), device=device)
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine)
    assert [t.unique().tolist() for t in gathered] == [[float(r)] for r in range(size)]
    blocks = torch.arange(float(2 * size), device=device)
    received = torch.empty_like(blocks)
    dist.all_to_all_single(received, blocks)
    assert received.tolist() == [2 * rank, 2 * rank + 1] * size
    share = torch.empty(2, device=device)
    dist.reduce_scatter_tensor(share, blocks)
    assert share.tolist() == [size * 2.0 * rank, size * (2.0 * rank + 1)]
    dist.broadcast(mine, 0)
    assert mine.unique().tolist() == [0.0]


def test_messages(device):
    rank, size = pycomm.rank(), pycomm.size()
    sent = torch.full((7,), float(rank), device=device)
    received = torch.empty_like(sent)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
    )
    for work in works:
        work.wait()
    assert received.unique().tolist() == [float((rank - 1) % size)]


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_data_parallel_gradients_are_the_mean(device, options):
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())])
    net = net.to(device)
    alone = [param.detach().clone().requires_grad_() for param in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    model = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.05, **options)
    for step in range(4):
        torch.manual_seed(100 * step + pycomm.rank())
        x = torch.randn(16, 64).to(device)
        model.zero_grad()
        model(x).square().mean().backward()
        loss = torch.func.functional_call(net, dict(zip(names, alone, strict=True)), x)
        gradients = torch.autograd.grad(loss.square().mean(), alone)
        for param, gradient in zip(net.parameters(), gradients, strict=True):
            expected = pycomm.all_reduce(gradient.cpu(), pycomm.ReduceOp.AVG)
            torch.testing.assert_close(param.grad.cpu(), expected, rtol=1e-4, atol=1e-6)
