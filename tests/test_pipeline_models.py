"""What models ask of a pipeline: structures, skips, shapes that change, dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from test_pipeline import (
    SCHEDULES,
    accumulate,
    assert_equal_parts,
    batches,
    block_model,
    optimizer_of_replicas,
    sgd,
    trained_alone,
)
from torch import Tensor, nn

from pycomm import GradScaler, _core
from pycomm.mesh import MeshLayout
from pycomm.pipeline import Pipeline, Stash, Take

Batch = tuple[Any, Any, int]  # input, target, rows
mse = nn.functional.mse_loss


def train_both(
    ranks: int,
    model: nn.Sequential,
    data: Sequence[Batch],
    *,
    loss_fn: Callable[..., Tensor] = mse,
    hosts: Sequence[int] | None = None,
    target_on_first: bool = False,
    micro_batches: int = 4,
    **options: Any,
) -> list[Pipeline]:
    """Train a model as a pipeline and in one process; check that they end with the same bits."""

    def run(group: _core.Group) -> Pipeline:
        pipeline = Pipeline(
            copy.deepcopy(model), loss_fn, micro_batches=micro_batches, group=group, **options
        )
        optimizer = sgd(pipeline.parameters()) if list(pipeline.parameters()) else None
        for x, y, _ in data:
            if optimizer is not None:
                optimizer.zero_grad()
            gives_target = group.rank == (0 if target_on_first else group.size - 1)
            pipeline.step(x if group.rank == 0 else None, y if gives_target else None)
            if optimizer is not None:
                optimizer.step()
        return pipeline

    pipelines = run_ranks(ranks, run, hosts=hosts)
    optimizer = sgd(model.parameters())
    for x, y, rows in data:
        optimizer.zero_grad()
        accumulate(model, loss_fn, x, y, micro_batches, rows)
        optimizer.step()
    parts = [{**dict(p.named_parameters()), **dict(p.module.named_buffers())} for p in pipelines]
    whole = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert_equal_parts(parts, whole)
    return pipelines


def with_rows(data: Sequence[tuple[Tensor, Tensor]]) -> list[Batch]:
    return [(x, y, len(x)) for x, y in data]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("hosts", [[0, 1], [0, 0, 1], [0, 1, 0, 1]])
def test_stages_on_several_hosts(hosts: list[int], schedule: str) -> None:
    data = with_rows(batches(8, 3))
    train_both(len(hosts), block_model(), data, hosts=hosts, schedule=schedule)


class Spread(nn.Module):
    """Returns a structure: of tensors with and without gradient, transposed, empty, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.linear(x)
        return {
            "pair": (y.t(), y.detach() > 0),
            "rest": [torch.empty(0, 3), None, 2.5, "text", y[:, ::2]],
        }


class Gathered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, value: dict[str, Any]) -> Tensor:
        transposed, positive = value["pair"]
        empty, nothing, factor, text, half = value["rest"]
        assert not transposed.is_contiguous() and nothing is None and text == "text"
        assert empty.shape == (0, 3) and not positive.requires_grad
        return self.linear(transposed.t() * positive) * factor + half.sum(1, keepdim=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_structures_of_tensors_and_constants(schedule: str) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(Spread(), Gathered(), nn.Tanh(), nn.Linear(3, 3).double())
    train_both(2, model, with_rows(batches(8, 4)), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_skip_connections_pass_the_stages_between(ranks: int, schedule: str) -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Sequential(nn.Linear(5, 5), Stash("input")),
            nn.Sequential(nn.Linear(5, 5), Stash("one")),
            nn.Tanh(),
            nn.Linear(5, 5),
            nn.Sequential(Take("one", torch.mul), nn.Linear(5, 5)),
            nn.Sequential(Stash("short"), nn.Tanh(), Take("short", torch.add)),
            nn.Linear(5, 5),
            nn.Sequential(Take("input", torch.add), nn.Linear(5, 3)),
        ).double()

    train_both(ranks, model(), with_rows(batches(8, 5)), schedule=schedule)


def test_targets_go_straight_from_the_first_rank_to_the_last() -> None:
    for ranks in (1, 2, 3):
        data = with_rows(batches(7, 3))
        train_both(ranks, block_model(), data, target_on_first=True, micro_batches=3)


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_shapes_may_change_with_every_step_and_micro_batch(schedule: str) -> None:
    generator = torch.Generator().manual_seed(3)
    data: list[Batch] = []
    # Beyond the first slots, which hold 4 KiB, and then shorter again.
    for rows, length in [(4, 3), (5, 40), (9, 700), (6, 2), (4, 900), (7, 1), (7, 1)]:
        x = torch.randn(rows, length, 5, generator=generator, dtype=torch.float64)
        data.append((x, torch.randn(rows, length, 3, generator=generator).double(), rows))
    train_both(3, block_model(), data, schedule=schedule)
    train_both(2, block_model(), data, schedule=schedule, hosts=[0, 1])


class Positions(nn.Module):
    """Adds a parameter of its input's shape: its gradient is what comes in, in the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(30.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.view(2, 3, 5)


def test_what_shares_memory_with_a_slot_is_not_overwritten() -> None:
    """A gradient that autograd keeps as it is, an input that comes out again, one that stays."""
    kept: list[Tensor] = []

    class Keeper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(x.detach())
            return x

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(12, 3, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 5).double(), Keeper(), Positions(), nn.Identity())
    expected = [model[0](part).detach() for part in x.split(2)]
    train_both(4, model, [(x, torch.zeros_like(x), 12)], micro_batches=6)
    assert all(map(torch.equal, kept[:6], expected))


def test_stages_without_parameters_and_without_gradients() -> None:
    model = block_model()
    layers: list[nn.Module] = [nn.Tanh(), nn.Identity(), *model, nn.Tanh()]
    for param in model[0].parameters():
        param.requires_grad_(False)
    for schedule in SCHEDULES:
        parts = nn.Sequential(*copy.deepcopy(layers))
        stages = [2, 1, 3, 5] if schedule != "interleaved" else [1, 1, 1, 2, 2, 2, 1, 1]
        train_both(4, parts, with_rows(batches(8, 3)), schedule=schedule, stages=stages)


def test_integers_enter_the_first_stage() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11)
    ).double()
    generator = torch.Generator().manual_seed(5)
    data: list[Batch] = []
    for _ in range(4):
        x = torch.randint(0, 11, (6,), generator=generator)
        data.append((x, (x + 1) % 11, 6))
    train_both(2, model, data, loss_fn=nn.functional.cross_entropy, micro_batches=3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recomputation_changes_no_bit_and_runs_batch_norm_once(schedule: str) -> None:
    torch.manual_seed(6)
    layers: list[nn.Module] = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6)]
    layers += [nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 3)]
    model = nn.Sequential(*layers).double()
    for recompute in (False, True):
        data = with_rows(batches(9, 3))
        train_both(2, copy.deepcopy(model), data, schedule=schedule, recompute=recompute)


def test_a_sum_is_not_weighted() -> None:
    model, data = block_model(), batches(7, 2)

    def summed(output: Tensor, target: Tensor) -> Tensor:
        return mse(output, target, reduction="sum")

    def run(group: _core.Group) -> dict[str, Tensor]:
        pipeline = Pipeline(
            copy.deepcopy(model), summed, micro_batches=4, group=group, loss_reduction="sum"
        )
        loss = pipeline.step(*data[0])
        torch.testing.assert_close(loss, summed(model(data[0][0]), data[0][1]))
        return {name: param.grad for name, param in pipeline.named_parameters()}

    parts = run_ranks(2, run)
    for x, y in zip(data[0][0].tensor_split(4), data[0][1].tensor_split(4), strict=True):
        summed(model(x), y).backward()
    assert_equal_parts(parts, {name: p.grad for name, p in model.named_parameters()})


def test_each_stage_may_have_extra_inputs() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 5).double()

        def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            return self.linear(x * mask) * scale

    torch.manual_seed(7)
    stages = [Masked(), Masked(), Masked()]
    x = torch.randn(7, 5).double()
    masks = [(torch.rand(7, 5) > 0.3).double() for _ in stages]
    target = torch.randn(7, 5).double()

    def run(group: _core.Group) -> dict[str, Tensor]:
        mine = [copy.deepcopy(s) if r == group.rank else None for r, s in enumerate(stages)]
        pipeline = Pipeline(mine, mse, micro_batches=3, group=group)
        extra = {group.rank: {"mask": masks[group.rank], "scale": 2.0}}
        pipeline.step(x, target, extra=extra)
        return {name: param.grad for name, param in pipeline.named_parameters()}

    parts = run_ranks(3, run)
    for rows in torch.arange(7).tensor_split(3):
        value = x[rows]
        for stage, mask in zip(stages, masks, strict=True):
            value = stage(value, mask[rows], 2.0)
        (mse(value, target[rows]) * (len(rows) / 7)).backward()
    whole = dict(nn.Sequential(*stages).named_parameters())
    assert_equal_parts(parts, {name: p.grad for name, p in whole.items()})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_evaluation_returns_the_batchs_output_or_its_loss(ranks: int, schedule: str) -> None:
    model = block_model()
    x, y = batches(7, 1)[0]

    def run(group: _core.Group) -> tuple[Any, Tensor]:
        pipeline = Pipeline(
            copy.deepcopy(model), mse, schedule=schedule, micro_batches=3, group=group
        )
        pipeline.eval().step(x, y)
        outputs = [pipeline.evaluate(x) for _ in range(3)]
        assert outputs[0] is None or all(torch.equal(outputs[0], other) for other in outputs)
        loss = pipeline.evaluate(x, y)
        assert pipeline.statistics.most_held == 0
        return outputs[0], loss

    results = run_ranks(ranks, run)
    with torch.no_grad():
        expected = torch.cat([model(part) for part in x.tensor_split(3)])
    assert [output is None for output, _ in results] == [True] * (ranks - 1) + [False]
    assert torch.equal(results[-1][0], expected)
    for _, loss in results:
        torch.testing.assert_close(loss, mse(expected, y))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shared_parameters_have_the_sum_of_their_gradients(schedule: str) -> None:
    """A split sum rounds differently, hence the tolerance: 1e-12 of numbers around 1."""

    class Head(nn.Module):
        def __init__(self, embedding: nn.Embedding) -> None:
            super().__init__()
            self.weight = embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    torch.manual_seed(8)
    embedding = nn.Embedding(7, 5)
    model = nn.Sequential(
        embedding, nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 5), Head(embedding)
    ).double()
    x = torch.randint(0, 7, (8,))
    loss_fn = nn.functional.cross_entropy
    stages = 6 if schedule == "interleaved" else None

    def run(group: _core.Group) -> tuple[dict[str, Tensor], Tensor]:
        pipeline = Pipeline(
            copy.deepcopy(model),
            loss_fn,
            schedule=schedule,
            stages=stages,
            micro_batches=4,
            group=group,
        )
        optimizer = sgd(pipeline.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            pipeline.step(x, x)
            norm = pipeline.clip_grad_norm_(0.1)
            optimizer.step()
        pipeline.evaluate(x, x)  # whatever is in .grad
        return dict(pipeline.named_parameters()), norm

    results = run_ranks(3, run)
    optimizer = sgd(model.parameters())
    for _ in range(5):
        optimizer.zero_grad()
        accumulate(model, loss_fn, x, x, 4, 8)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    whole = {**dict(model.named_parameters()), "5.weight": embedding.weight}
    assert_equal_parts([part for part, _ in results], whole, exactly=False)
    assert torch.equal(results[0][0]["0.weight"], results[2][0]["5.weight"])
    for _, theirs in results:
        torch.testing.assert_close(theirs, norm, rtol=0, atol=1e-12)


def test_autocast_and_a_scaler_that_skips_everywhere() -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(8, 5), torch.randn(8, 3)

    def train(step: Callable[[Any], Any], parameters: Any, scaler: Any) -> list[float]:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scales = []
        for number in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                step(x if number != 2 else x * float("inf"))
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    options = {"init_scale": 1024.0, "growth_interval": 2}

    def run(group: _core.Group) -> tuple[dict[str, Tensor], list[float]]:
        pipeline = Pipeline(copy.deepcopy(model), mse, micro_batches=2, group=group)
        scaler = GradScaler("cpu", group=group, **options)
        scales = train(
            lambda batch: pipeline.step(batch, y, scaler=scaler), pipeline.parameters(), scaler
        )
        return dict(pipeline.named_parameters()), scales

    results = run_ranks(2, run)
    scaler = torch.amp.GradScaler("cpu", **options)

    def step(batch: Tensor) -> None:
        for part, target in zip(batch.split(4), y.split(4), strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = mse(model(part), target) * 0.5
            with torch.autocast("cpu", enabled=False):
                scaler.scale(loss).backward()

    scales = train(step, model.parameters(), scaler)
    assert scales == [1024.0, 2048.0, 1024.0, 1024.0]
    assert [theirs for _, theirs in results] == [scales, scales]
    assert_equal_parts([part for part, _ in results], dict(model.named_parameters()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduced", ["with overlap", "at the end", "in shares"])
def test_data_parallel_pipelines_end_with_the_canonical_fold(schedule: str, reduced: str) -> None:
    """dp 2 x pp 2: each replica takes half of the rows; gradients are averaged in rank order."""
    model, data = block_model(), batches(12, 5)
    layout = MeshLayout.of({"dp": 2, "pp": 2}, [[0, 1, 2, 3]])

    def run(world: _core.Group) -> dict[str, Tensor]:
        here = layout.coordinate(world.rank)
        row = world.split(here["dp"], here["pp"])
        column = world.split(here["pp"], here["dp"])
        assert row is not None and column is not None
        pipeline = Pipeline(
            copy.deepcopy(model), mse, schedule=schedule, micro_batches=3, group=row
        )
        optimizer = optimizer_of_replicas(pipeline, column, reduced)
        for x, y in data:
            optimizer.zero_grad()
            pipeline.step(x[here["dp"] :: 2], y[here["dp"] :: 2])
            optimizer.step()
        return dict(pipeline.named_parameters())

    parts = run_ranks(4, run)
    optimizer = sgd(model.parameters())
    for x, y in data:
        of_replicas = []
        for replica in range(2):
            model.zero_grad()
            accumulate(model, mse, x[replica::2], y[replica::2], 3, 6)
            of_replicas.append([param.grad for param in model.parameters()])
        for param, first, second in zip(model.parameters(), *of_replicas, strict=True):
            assert first is not None and second is not None
            param.grad = (first + second) / 2
        optimizer.step()
    assert_equal_parts(parts[:2], dict(model.named_parameters()))
    assert_equal_parts(parts[2:], dict(model.named_parameters()))


def test_the_measured_cut_leaves_the_model_as_it_was() -> None:
    model = block_model()
    model.append(nn.BatchNorm1d(3).double())
    data = batches(8, 3)
    sample = data[0][0]

    def run(group: _core.Group) -> dict[str, Tensor]:
        pipeline = Pipeline(
            copy.deepcopy(model).eval(),
            mse,
            micro_batches=2,
            group=group,
            balance="measured_seconds",
            sample=sample,
        )
        optimizer = sgd(pipeline.parameters())
        for x, y in data:
            optimizer.zero_grad()
            pipeline.step(x, y)
            optimizer.step()
        return dict(pipeline.named_parameters())

    parts = run_ranks(2, run)
    expected, _ = trained_alone(model.eval(), data, 2)
    assert_equal_parts(parts, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("width", [6, 2000])  # small tensors enter a stage in another way
def test_stages_that_begin_in_place_and_inputs_that_want_a_gradient(
    schedule: str, width: int
) -> None:
    torch.manual_seed(10)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width if layers else 5, width), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers).double()
    x = torch.randn(16, 5).double().requires_grad_()
    y = torch.randn(16, width).double()

    def run(group: _core.Group) -> tuple[dict[str, Tensor], Tensor | None]:
        mine = x.detach().clone().requires_grad_()
        stages = [1] * 8 if schedule == "interleaved" else [1, 2, 2, 3]
        pipeline = Pipeline(
            copy.deepcopy(model),
            mse,
            schedule=schedule,
            stages=stages,
            micro_batches=2,
            group=group,
        )
        pipeline.step(mine, y)
        return {name: param.grad for name, param in pipeline.named_parameters()}, mine.grad

    results = run_ranks(4, run)
    accumulate(model, mse, x, y, 2, 16)
    assert_equal_parts(
        [part for part, _ in results], {name: p.grad for name, p in model.named_parameters()}
    )
    assert x.grad is not None and results[0][1] is not None
    assert torch.equal(results[0][1], x.grad)
