"""Pipelines, ShardedOptimizer and GradScaler on a double of CUDA and NCCL: no GPU has run them.

The double's GPUs do as documented what the CPU does, so the bits are those of one process on the
CPU. Autograd works as with real GPUs, each one's part of a backward pass in a thread of that GPU.
For that a process loads ``tests/double/autograd.cpp`` before torch; it holds the tests marked
``double_autograd``, all but the one that starts it.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from double_gpu import (
    CALLERS,
    NCCLS,
    NOBODY,
    autograd_library,
    from_gpu,
    host_waits,
    module_on_gpu,
    on_gpu,
    run_double_gpu_ranks,
    the_double,
)
from test_pipeline import (
    SCHEDULES,
    accumulate,
    assert_equal_parts,
    batches,
    block_model,
    optimizer_of_replicas,
    sgd,
)
from test_pipeline_models import Gathered, Spread
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pycomm import (
    GradScaler,
    MismatchError,
    PeerLostError,
    ShardedOptimizer,
    StageError,
    _core,
)
from pycomm.mesh import MeshLayout
from pycomm.pipeline import Pipeline, Stash, Take

needs_headers = pytest.mark.skipif(
    _core.gpu_report(_core.GpuPlaces()).headers.startswith("not in this build"),
    reason="built without the headers of CUDA and NCCL",
)
double_autograd = pytest.mark.double_autograd
starving = pytest.mark.parametrize("starved", [NOBODY, CALLERS, NCCLS])
mse = nn.functional.mse_loss


def placed(value: Any, gpu: int) -> Any:
    return tree_map_only(Tensor, lambda t: on_gpu(t, gpu), value)


def back(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t if t.is_cpu else from_gpu(t.detach()), value)


def whole_and_parts(
    ranks: int,
    model: nn.Sequential,
    data: Sequence[tuple[Tensor, Tensor]],
    *,
    micro_batches: int = 4,
    loss_fn: Callable[..., Tensor] = mse,
    target_on_first: bool = False,
    starved: int = NOBODY,
    transport: _core.GpuTransport = _core.GpuTransport.AUTO,
    **options: Any,
) -> None:
    """A pipeline on the double and one process on the CPU end with the same bits."""

    def run(group):
        pipeline = Pipeline(
            module_on_gpu(copy.deepcopy(model), group.rank),
            loss_fn,
            micro_batches=micro_batches,
            group=group,
            device=f"cuda:{group.rank}",
            **options,
        )
        optimizer = sgd(pipeline.parameters()) if list(pipeline.parameters()) else None
        losses = []
        for x, y in data:
            if optimizer is not None:
                optimizer.zero_grad()
            gives_target = group.rank == (0 if target_on_first else group.size - 1)
            losses.append(
                pipeline.step(
                    on_gpu(x, group.rank) if group.rank == 0 else None,
                    on_gpu(y, group.rank) if gives_target else None,
                )
            )
            if optimizer is not None:
                optimizer.step()
        named = [*pipeline.named_parameters(), *pipeline.module.named_buffers()]
        return back(dict(named)), back(losses)

    results = run_double_gpu_ranks(ranks, run, starving=starved, transport=transport)
    optimizer = sgd(model.parameters())
    expected = []
    for x, y in data:
        optimizer.zero_grad()
        expected.append(accumulate(model, loss_fn, x, y, micro_batches, len(x)))
        optimizer.step()
    named = [*model.named_parameters(), *model.named_buffers()]
    assert_equal_parts([part for part, _ in results], dict(named))
    for _, losses in results:
        assert all(map(torch.equal, losses, expected))


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_end_with_the_bits_of_one_process(ranks, schedule):
    for micro_batches in (1, 3, 8):
        whole_and_parts(
            ranks, block_model(6), batches(8, 2), schedule=schedule, micro_batches=micro_batches
        )


@double_autograd
@pytest.mark.parametrize("starved", [CALLERS, NCCLS])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_stream_that_lags_behind_changes_a_bit(schedule, starved):
    """Slots that are used again, activations that are dropped while they are sent."""
    whole_and_parts(
        3, block_model(6), batches(4, 2), schedule=schedule, starved=starved, micro_batches=4
    )


@double_autograd
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_without_nccl_the_bits_are_the_same(schedule):
    whole_and_parts(
        2, block_model(), batches(8, 2), schedule=schedule, transport=_core.GpuTransport.STAGED
    )


@double_autograd
def test_targets_go_straight_from_the_first_rank_to_the_last():
    whole_and_parts(3, block_model(), batches(7, 3), target_on_first=True, micro_batches=3)


@double_autograd
@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_shapes_may_change_with_every_step_and_micro_batch(schedule):
    generator = torch.Generator().manual_seed(3)
    data = []
    # Beyond the first slots, which hold 4 KiB, and then shorter again.
    for rows, length in [(4, 3), (5, 40), (9, 700), (6, 2), (7, 1), (7, 1)]:
        x = torch.randn(rows, length, 5, generator=generator, dtype=torch.float64)
        data.append((x, torch.randn(rows, length, 3, generator=generator).double()))
    whole_and_parts(3, block_model(), data, schedule=schedule)


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_structures_cross_from_gpu_to_gpu(schedule):
    torch.manual_seed(1)
    model = nn.Sequential(Spread(), Gathered(), nn.Tanh(), nn.Linear(3, 3).double())
    whole_and_parts(2, model, batches(8, 3), schedule=schedule)


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_skip_connections_pass_the_stages_between(schedule):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(5, 5), Stash("input")),
        nn.Sequential(nn.Linear(5, 5), Stash("one")),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Sequential(Take("one", torch.mul), nn.Linear(5, 5)),
        nn.Sequential(Take("input", torch.add), nn.Linear(5, 3)),
    ).double()
    whole_and_parts(3, model, batches(8, 2), schedule=schedule)


@double_autograd
def test_stages_without_parameters_and_without_gradients():
    """Gradients that are none travel, too."""
    model = block_model(5)
    for param in model[0].parameters():
        param.requires_grad_(False)
    for schedule in ("1f1b", "interleaved", "zero_bubble"):
        parts = nn.Sequential(nn.Tanh(), *copy.deepcopy(model), nn.Tanh())
        stages = [2, 3, 2] if schedule != "interleaved" else [1, 1, 1, 2, 1, 1]
        whole_and_parts(3, parts, batches(8, 2), schedule=schedule, stages=stages)


@double_autograd
def test_recomputation_changes_no_bit():
    torch.manual_seed(6)
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)]
    layers += [nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    for schedule in ("1f1b", "zero_bubble"):
        whole_and_parts(2, model, batches(9, 2), schedule=schedule, recompute=True)


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_returns_the_batchs_output_or_its_loss(schedule):
    model = block_model(6)
    x, y = batches(7, 1)[0]

    def run(group):
        pipeline = Pipeline(
            module_on_gpu(copy.deepcopy(model), group.rank),
            mse,
            schedule=schedule,
            micro_batches=3,
            group=group,
        )
        x_there, y_there = placed((x, y), group.rank)
        pipeline.eval().step(x_there, y_there)
        output = pipeline.evaluate(x_there)
        return back(output), back(pipeline.evaluate(x_there, y_there))

    results = run_double_gpu_ranks(2, run)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in x.tensor_split(3)])
    assert results[0][0] is None
    assert torch.equal(results[1][0], expected)
    for _, loss in results:
        torch.testing.assert_close(loss, mse(expected, y))


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_parameters_and_clipping(schedule):
    """A sum split otherwise rounds otherwise, hence the tolerance: 1e-12 of numbers around 1."""

    class Head(nn.Module):
        def __init__(self, embedding):
            super().__init__()
            self.weight = embedding.weight

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    torch.manual_seed(8)
    embedding = nn.Embedding(7, 5)
    model = nn.Sequential(
        embedding, nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 5), Head(embedding)
    ).double()
    x = torch.randint(0, 7, (8,))
    loss_fn = nn.functional.cross_entropy

    def run(group):
        there = module_on_gpu(copy.deepcopy(model), group.rank)
        pipeline = Pipeline(there, loss_fn, schedule=schedule, micro_batches=4, group=group)
        optimizer = sgd(pipeline.parameters())
        x_there = on_gpu(x, group.rank)
        for _ in range(3):
            optimizer.zero_grad()
            pipeline.step(x_there, x_there)
            norm = pipeline.clip_grad_norm_(0.1)
            optimizer.step()
        return back(dict(pipeline.named_parameters())), norm

    results = run_double_gpu_ranks(2, run)
    optimizer = sgd(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        accumulate(model, loss_fn, x, x, 4, 8)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    whole = {**dict(model.named_parameters()), "5.weight": embedding.weight}
    assert_equal_parts([part for part, _ in results], whole, exactly=False)
    for part, theirs in results:
        torch.testing.assert_close(theirs, norm, rtol=0, atol=1e-12)
        assert "0.weight" in part or torch.equal(part["5.weight"], results[0][0]["0.weight"])


@double_autograd
@pytest.mark.parametrize(
    ("reduced", "schedule"),
    [
        *(("with overlap", schedule) for schedule in SCHEDULES),
        ("at the end", "1f1b"),
        ("in shares", "zero_bubble"),
    ],
)
def test_data_parallel_pipelines(reduced, schedule):
    """dp 2 x pp 2: of two replicas NCCL's sum of halves is the half of the sum."""
    model = block_model()
    data = [
        [(x[r::2].contiguous(), y[r::2].contiguous()) for r in (0, 1)] for x, y in batches(12, 2)
    ]
    layout = MeshLayout.of({"dp": 2, "pp": 2}, [[0, 1, 2, 3]])

    def run(world):
        here = layout.coordinate(world.rank)
        row = world.split(here["dp"], here["pp"])
        column = world.split(here["pp"], here["dp"])
        pipeline = Pipeline(
            module_on_gpu(copy.deepcopy(model), world.rank),
            mse,
            schedule=schedule,
            micro_batches=3,
            group=row,
        )
        optimizer = optimizer_of_replicas(pipeline, column, reduced)
        for halves in data:
            optimizer.zero_grad()
            pipeline.step(*placed(halves[here["dp"]], world.rank))
            optimizer.step()
        return back(dict(pipeline.named_parameters()))

    parts = run_double_gpu_ranks(4, run)
    optimizer = sgd(model.parameters())
    for halves in data:
        of_replicas = []
        for x, y in halves:
            model.zero_grad()
            accumulate(model, mse, x, y, 3, 6)
            of_replicas.append([param.grad for param in model.parameters()])
        for param, first, second in zip(model.parameters(), *of_replicas, strict=True):
            param.grad = (first + second) / 2
        optimizer.step()
    assert_equal_parts(parts[:2], dict(model.named_parameters()))
    assert_equal_parts(parts[2:], dict(model.named_parameters()))


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_hosts_wait_for_their_gpus_at_the_end_of_a_step_alone(schedule):
    """The last stage's, for the loss; and all of them once to clip by a norm."""

    def run(group):
        there = module_on_gpu(block_model(), group.rank)
        pipeline = Pipeline(there, mse, schedule=schedule, micro_batches=3, group=group)
        waits = []
        for x, y in batches(7, 3):
            x, y = placed((x, y), group.rank)
            before = host_waits[group.rank]
            loss = pipeline.step(x, y)
            waits.append(host_waits[group.rank] - before)
            assert loss.is_cuda == (group.rank == 1)
        before = host_waits[group.rank]
        pipeline.clip_grad_norm_(0.1)
        return waits, host_waits[group.rank] - before

    assert run_double_gpu_ranks(2, run) == [([0, 0, 0], 1), ([1, 1, 1], 1)]


@double_autograd
def test_a_scaler_skips_a_step_everywhere(monkeypatch):
    """On the rank, too, whose parameters want no gradient."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # else torch's does nothing
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3), nn.Linear(3, 3))
    for param in model[0].parameters():
        param.requires_grad_(False)
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def run(group):
        there = module_on_gpu(copy.deepcopy(model), group.rank)
        pipeline = Pipeline(there, mse, micro_batches=2, group=group, stages=[1, 1, 2])
        parameters = list(pipeline.parameters()) or [nn.Parameter(on_gpu(torch.ones(1), 1))]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scaler = GradScaler("cuda", group=group, init_scale=1024.0, growth_interval=2)
        seen = []
        for number in range(4):
            optimizer.zero_grad()
            batch = x if number != 2 else x * float("inf")
            pipeline.step(*placed((batch, y), group.rank), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            seen.append((scaler.get_scale(), back(parameters)))
        return seen

    for seen in run_double_gpu_ranks(3, run):
        assert [scale for scale, _ in seen] == [1024.0, 2048.0, 1024.0, 1024.0]
        assert all(map(torch.equal, seen[1][1], seen[2][1]))
    moved = seen[2][1], seen[3][1]  # of the last rank
    assert not any(map(torch.equal, *moved))


@double_autograd
@starving
def test_sharded_optimizer(starved):
    """Of a share's state, too, that goes through the host from two ranks to one."""
    model = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 3)).double()
    data = [[batches(4, 4, seed)[step] for seed in (0, 1)] for step in range(4)]

    def run(group):
        replica = module_on_gpu(copy.deepcopy(model), group.rank)
        optimizer = ShardedOptimizer(torch.optim.AdamW, replica.parameters(), lr=0.01, group=group)
        for step, halves in enumerate(data):
            if step == 2:
                state = optimizer.full_state_dict()
                optimizer.load_full_state_dict(state)
            optimizer.zero_grad()
            x, y = placed(halves[group.rank], group.rank)
            mse(replica(x), y).backward()
            norm = optimizer.clip_grad_norm_(100.0)
            optimizer.step()
        kept = [t for of in state["state"].values() for t in of.values()]
        assert kept and all(t.is_cpu for t in kept)
        return back(list(replica.parameters())), norm

    results = run_double_gpu_ranks(2, run, starving=starved)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for halves in data:
        of_ranks = []
        for x, y in halves:
            model.zero_grad()
            mse(model(x), y).backward()
            of_ranks.append([param.grad for param in model.parameters()])
        for param, first, second in zip(model.parameters(), *of_ranks, strict=True):
            param.grad = (first + second) / 2
        expected = nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    for params, norm in results:
        assert all(map(torch.equal, params, model.parameters()))
        torch.testing.assert_close(norm, expected, rtol=0, atol=1e-12)


# --- what cannot work -----------------------------------------------------------------------------


def errors_of(ranks: int, attempt: Callable[[_core.Group], Any], **options: Any) -> list[Exception]:
    """What each rank's attempt raises; every one must."""

    def run(group):
        try:
            attempt(group)
        except Exception as error:
            return error
        raise AssertionError(f"rank {group.rank} raised nothing")

    return run_double_gpu_ranks(ranks, run, **options)


@double_autograd
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backward", [False, True])
def test_a_stage_that_raises_ends_the_step_everywhere(schedule, backward):
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, number):
            ctx.number = number
            if number == 2 and not backward:
                raise ValueError("out of range")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            if ctx.number == 2:
                raise ValueError("out of range")
            return gradient, None

    class Broken(nn.Module):
        seen = 0

        def forward(self, x):
            self.seen += 1
            return Breaks.apply(x, self.seen)

    def attempt(group):
        model = block_model(6)
        model.append(Broken())
        there = module_on_gpu(model, group.rank)
        pipeline = Pipeline(there, mse, schedule=schedule, micro_batches=4, group=group)
        for x, y in batches(8, 2):  # a rank that was done hears of it in the next step
            pipeline.step(*placed((x, y), group.rank))

    *others, broken = errors_of(3, attempt)
    kind = "backward|input gradient|weight gradient" if backward else "forward"
    assert isinstance(broken, StageError)
    assert re.search(
        rf"({kind}) of micro-batch \d in stage \d of \d, on rank 2: ValueError", str(broken)
    )
    for error in others:
        assert isinstance(error, PeerLostError) and "ValueError: out of range" in str(error)


@double_autograd
def test_a_stage_on_the_cpu_beside_one_on_a_gpu_is_a_mismatch():
    def attempt(group):
        model = block_model()
        model = module_on_gpu(model, 0) if group.rank == 0 else model
        pipeline = Pipeline(model, mse, micro_batches=2, group=group)
        x, y = batches(8, 1)[0]
        pipeline.step(on_gpu(x, 0) if group.rank == 0 else None, y if group.rank == 1 else None)

    for error in errors_of(2, attempt):
        assert isinstance(error, MismatchError), error
        assert "on a GPU" in str(error)


@double_autograd
def test_what_a_stage_leaves_on_the_host_goes_to_the_next_ones_gpu():
    """A target that was given as a CPU tensor, too; where a stage wants them is its business."""

    class Masks(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 1, dtype=torch.float64), x

    class Masked(nn.Module):
        def forward(self, pair):
            mask, x = pair
            return x * mask.to(x.device)

    model = block_model(4)
    model.insert(2, Masks())
    model.insert(3, Masked())
    x, y = batches(8, 1)[0]

    def run(group):
        there = module_on_gpu(copy.deepcopy(model), group.rank)
        pipeline = Pipeline(there, mse, micro_batches=2, group=group, stages=[3, 3])
        pipeline.step(on_gpu(x, group.rank), y if group.rank == 0 else None)
        return back({name: param.grad for name, param in pipeline.named_parameters()})

    parts = run_double_gpu_ranks(2, run)
    accumulate(model, mse, x, y, 2, 8)
    assert_equal_parts(parts, {name: param.grad for name, param in model.named_parameters()})


@needs_headers
def test_a_slot_that_waited_long_leaves_its_message_the_whole_time():
    """A slot is posted when a step begins, and its message may come a step's length later."""

    def run(group):
        slot = on_gpu(torch.zeros(4), group.rank)
        stream = (group.rank, the_double().stream(group.rank))
        if group.rank == 1:
            work = group.receive_into_slot((slot.data_ptr(), 16), 0, 7, place=stream, timeout_s=1)
            group.barrier()
        else:
            time.sleep(1.2)
            group.barrier()
            slot.copy_(torch.arange(4.0))
            the_double().hold(0, True)
            try:
                work = group.send_to_slot(slot.data_ptr(), 16, 1, 7, 0, place=stream)
                time.sleep(0.2)  # launched by now, and the GPU of rank 0 has not come to it
            finally:
                the_double().hold(0, False)
        group.wait(work)
        work.order_before(the_double().stream)
        values = from_gpu(slot).tolist()
        group.barrier()
        return values

    assert run_double_gpu_ranks(2, run) == [[0, 1, 2, 3]] * 2


# --- the process that these tests run in ----------------------------------------------------------


@needs_headers
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a CUDA of its own")
@pytest.mark.timeout(250)
def test_in_a_process_whose_autograd_knows_the_double():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "double_autograd",
            __file__,
        ],
        env={**os.environ, "PYCOMM_DOUBLE_AUTOGRAD": str(autograd_library())},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
