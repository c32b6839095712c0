"""Pipelines, ShardedOptimizer and GradScaler on GPUs, against one process on this rank's GPU.

In float64, and close rather than equal: two GPUs need not choose the same kernels. What a missing
wait between two streams leaves behind is not close to anything.
"""

import contextlib
import copy

import pytest
import torch
from mode import ON_GPUS, needs_gpu
from torch import Tensor, nn

import pycomm
from pycomm.pipeline import Pipeline

pytestmark = pytest.mark.gpu

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero_bubble"]
WIDTH = 64
mse = nn.functional.mse_loss


class Block(nn.Module):
    """Now and then its GPU lags far behind the hosts; what it frees is soon overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if x.is_cuda and (self.calls + pycomm.rank()) % 3 == 0:
            torch.cuda._sleep(5_000_000)
        for _ in range(3):  # in the memory of what was sent or received, if that is free too early
            torch.full_like(x, float("nan"))
        return x + torch.tanh(self.linear(x))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(2 * pycomm.size()))).double()


def batches(rows: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Of every rank the same."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 2, rows, 50, WIDTH)
    return [tuple(pair) for pair in torch.randn(shape, generator=generator, dtype=torch.float64)]


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def assert_part(part: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert part
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-12)


def train_alone(net: nn.Module, data, micro_batches: int, device: torch.device) -> list[Tensor]:
    optimizer = sgd(net.parameters())
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=device)
        for x_part, y_part in zip(
            x.to(device).tensor_split(micro_batches),
            y.to(device).tensor_split(micro_batches),
            strict=True,
        ):
            loss = mse(net(x_part), y_part) * (len(x_part) / len(x))
            loss.backward()
            total += loss.detach()
        losses.append(total)
        optimizer.step()
    return losses


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("current", ["default stream", "another stream"])
def test_steps_end_as_those_of_one_process(device, schedule, micro_batches, current):
    """Targets travel from the first rank; slots are used again; shapes change in the third step."""
    data = [*batches(8, 2), *batches(20, 1), *batches(8, 5)]
    net = model().to(device)
    pipeline = Pipeline(copy.deepcopy(net), mse, schedule=schedule, micro_batches=micro_batches)
    optimizer = sgd(pipeline.parameters())
    on_stream = contextlib.nullcontext()
    if ON_GPUS and current == "another stream":
        torch.cuda.synchronize()
        on_stream = torch.cuda.stream(torch.cuda.Stream())
    losses = []
    with on_stream:
        for x, y in data:
            optimizer.zero_grad()
            first = pycomm.rank() == 0
            loss = pipeline.step(*((x.to(device), y.to(device)) if first else (None, None)))
            losses.append(loss)
            optimizer.step()
        if ON_GPUS:
            torch.cuda.current_stream().synchronize()
    expected = train_alone(net, data, micro_batches, device)
    assert_part(dict(pipeline.named_parameters()), dict(net.named_parameters()))
    for loss, its in zip(losses, expected, strict=True):
        torch.testing.assert_close(loss.cpu(), its.cpu(), rtol=1e-9, atol=0)


@needs_gpu
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hosts_wait_for_their_gpus_at_the_end_of_a_step_alone(device, schedule):
    """Torch raises where a call of its makes a host wait; the last stage's does, for the loss."""
    pipeline = Pipeline(model().to(device), mse, schedule=schedule, micro_batches=4)
    x, y = (t.to(device) for t in batches(8, 1)[0])
    pipeline.step(x, y)
    last = pycomm.rank() == pycomm.size() - 1
    torch.cuda.set_sync_debug_mode("default" if last else "error")
    try:
        for _ in range(3):
            pipeline.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_shared_parameters_clipping_and_evaluation(device):
    if pycomm.size() == 1:
        pytest.skip("one rank shares with nobody")
    net = model()
    net[-1].linear.weight = net[0].linear.weight
    net.to(device)
    data = batches(8, 3)
    pipeline = Pipeline(copy.deepcopy(net), mse, micro_batches=1)
    optimizer, alone = sgd(pipeline.parameters()), sgd(net.parameters())
    for x, y in data:
        optimizer.zero_grad()
        pipeline.step(x.to(device), y.to(device))
        norm = pipeline.clip_grad_norm_(0.01)
        optimizer.step()
        alone.zero_grad()
        mse(net(x.to(device)), y.to(device)).backward()
        expected = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        alone.step()
        torch.testing.assert_close(norm, expected.cpu(), rtol=1e-9, atol=0)
    assert_part(
        dict(pipeline.named_parameters()), dict(net.named_parameters(remove_duplicate=False))
    )
    x = data[0][0].to(device)
    output = pipeline.evaluate(x)
    if pycomm.rank() == pycomm.size() - 1:
        with torch.no_grad():
            torch.testing.assert_close(output, net(x), rtol=1e-9, atol=1e-12)
    else:
        assert output is None


def test_two_pipelines_with_data_parallelism(device):
    if pycomm.size() % 2 or pycomm.size() < 4:
        pytest.skip("needs 4 ranks, or another even number of them")
    mesh = pycomm.Mesh({"dp": 2, "pp": pycomm.size() // 2})
    net = model().to(device)
    pipeline = Pipeline(copy.deepcopy(net), mse, micro_batches=4, group=mesh["pp"])
    optimizer = pycomm.DistributedOptimizer(
        sgd(pipeline.parameters()), pipeline.named_parameters(), group=mesh["dp"]
    )
    data = batches(16, 4)
    for x, y in data:
        optimizer.zero_grad()
        half = mesh["dp"].rank
        pipeline.step(x[half::2].contiguous().to(device), y[half::2].contiguous().to(device))
        optimizer.step()
    train_alone(net, data, 1, device)
    assert_part(dict(pipeline.named_parameters()), dict(net.named_parameters()))


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_sharded_optimizer(device, options):
    """With its state through the host and back, too."""
    shared, whole = model().to(device), model().to(device)
    optimizer = pycomm.ShardedOptimizer(torch.optim.AdamW, shared.parameters(), lr=0.01, **options)
    other = pycomm.DistributedOptimizer(
        torch.optim.AdamW(whole.parameters(), lr=0.01, **options), whole.named_parameters()
    )
    for step, (x, y) in enumerate(batches(8, 4)):
        if step == 2:
            optimizer.load_full_state_dict(optimizer.full_state_dict())
        x, y = (t[pycomm.rank() % 8 :].to(device) for t in (x, y))
        for net, its in ((shared, optimizer), (whole, other)):
            its.zero_grad()
            mse(net(x), y).backward()
            its.step()
    assert_part(dict(shared.named_parameters()), dict(whole.named_parameters()))


def test_a_scaler_skips_a_step_everywhere(device):
    net = model().float().to(device)
    pipeline = Pipeline(net, mse, micro_batches=2)
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    scaler = pycomm.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    x, y = (t.float().to(device) for t in batches(8, 1)[0])
    scales, moved = [], []
    for number in range(4):
        before = [param.detach().clone() for param in pipeline.parameters()]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            pipeline.step(x if number != 2 else x * float("inf"), y, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not all(map(torch.equal, before, pipeline.parameters())))
    assert scales == [1024.0, 2048.0, 1024.0, 1024.0]
    assert moved == [True, True, False, True]
