"""Models and optimizers of all kinds: shared and split parameters, buffers, groups, dtypes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from test_checkpoint import differences
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from pycomm import (
    DistributedOptimizer,
    GradScaler,
    InvalidArgumentError,
    Mesh,
    ShardedOptimizer,
    _core,
    checkpoint,
)
from pycomm.pipeline import Pipeline
from pycomm.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    whole_state_dict,
)

mse = nn.functional.mse_loss


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Not on ranks that are threads: they share the random state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


# --- shared parameters ----------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def tied(seed: int = 0) -> nn.Sequential:
    def make() -> nn.Module:
        embedding = nn.Embedding(11, 4)
        return nn.Sequential(embedding, nn.Linear(4, 4), nn.Tanh(), Head(embedding.weight))

    model = seeded(make, seed).double()
    assert isinstance(model, nn.Sequential)
    return model


TIED, OTHER_TIED = tied(), tied(1)
TOKENS = torch.arange(8).reshape(4, 2) % 11
TARGETS = torch.ones(4, 2, 11, dtype=torch.float64)


class TiedRun:
    def __init__(self, model: nn.Sequential, group: _core.Group, lr: float) -> None:
        model = copy.deepcopy(model)
        self.model: nn.Sequential | Pipeline = model
        if group.size > 1:
            self.model = Pipeline(model, mse, micro_batches=2, group=group)
        # A group, as there may be none: the activation is a stage without parameters.
        self.optimizer = torch.optim.AdamW([{"params": [*self.model.parameters()]}], lr=lr)
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        self.optimizer.zero_grad()
        if isinstance(self.model, Pipeline):
            self.model.step(TOKENS, TARGETS)
        else:
            for x, y in zip(TOKENS.chunk(2), TARGETS.chunk(2), strict=True):
                (mse(self.model(x), y) * 0.5).backward()
        self.optimizer.step()


@pytest.mark.parametrize(("source", "target"), list(itertools.product([1, 2, 4], [1, 2, 4])))
def test_a_parameter_shared_between_stages_goes_everywhere(
    source: int, target: int, tmp_path: Path
) -> None:
    """Under both of its names, whoever wrote it, and whoever reads it."""

    def save(group: _core.Group) -> None:
        run = TiedRun(TIED, group, 0.01)
        run.step()
        checkpoint.save(tmp_path / "c", run.state, group=group)

    def load(group: _core.Group) -> None:
        run = TiedRun(OTHER_TIED, group, 7.0)
        checkpoint.load(tmp_path / "c", run.state, group=group)
        checkpoint.save(tmp_path / "again", run.state, group=group)

    run_ranks(source, save)
    run_ranks(target, load)
    saved, again = checkpoint.read(tmp_path / "c"), checkpoint.read(tmp_path / "again")
    assert not list(differences(saved, again))
    assert torch.equal(saved["model"]["0.weight"], saved["model"]["3.weight"])
    model = copy.deepcopy(OTHER_TIED)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    names = saved_names(tmp_path / "c")
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert {f"optimizer.state.{name}.weight.{key}" for name in "03"} <= names
    shapes = [optimizer.state[p]["exp_avg"].shape for p in model.parameters()]
    assert shapes == [p.shape for p in model.parameters()]


def saved_names(path: Path) -> set[str]:
    from torch.distributed.checkpoint import FileSystemReader

    return set(FileSystemReader(path).read_metadata().state_dict_metadata)


def test_two_tensors_do_not_become_one(tmp_path: Path) -> None:
    apart = copy.deepcopy(TIED)
    apart[3].weight = nn.Parameter(apart[3].weight.detach() + 1)

    def run(group: _core.Group) -> None:
        checkpoint.save(tmp_path / "c", {"model": apart}, group=group)
        with pytest.raises(InvalidArgumentError, match=r"'0\.weight' and '3\.weight'.* differ"):
            checkpoint.load(tmp_path / "c", {"model": copy.deepcopy(TIED)}, group=group)

    run_ranks(1, run)


def test_copies_that_stages_were_given_apart_are_one_parameter_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "c"

    def save(group: _core.Group) -> None:
        weight = TIED[0].weight.detach()
        stages = [nn.Embedding.from_pretrained(weight.clone(), freeze=False), None]
        if group.rank == 1:
            stages = [None, Head(nn.Parameter(weight.clone()))]
        ties = [("0.weight", "1.weight")]
        pipeline = Pipeline(stages, mse, micro_batches=2, ties=ties, group=group)
        optimizer = torch.optim.AdamW(pipeline.parameters())
        pipeline.step(TOKENS, TARGETS)
        optimizer.step()
        checkpoint.save(path, {"model": pipeline, "optimizer": optimizer}, group=group)

    run_ranks(2, save)
    embedding = nn.Embedding(11, 4).double()
    model = nn.Sequential(embedding, Head(embedding.weight))
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(checkpoint.read(path)["optimizer"])
    again = torch.optim.AdamW(model.parameters())

    def load(group: _core.Group) -> None:
        checkpoint.load(path, {"model": model, "optimizer": again}, group=group)

    run_ranks(1, load)
    assert not list(differences(again.state_dict(), optimizer.state_dict()))
    assert len(again.state) == 1


# --- split parameters -----------------------------------------------------------------------------


class Ordinary(nn.Module):
    """What the split one below is of ordinary layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(torch.tanh(self.up(self.embedding(x)))))
        return y


ORDINARY = seeded(Ordinary).double()
OTHER_ORDINARY = seeded(Ordinary, 1).double()


def split(model: nn.Module, group: _core.Group) -> nn.Module:
    whole = copy.deepcopy(model)
    assert isinstance(whole, Ordinary)
    whole.embedding = VocabParallelEmbedding.from_module(whole.embedding, group=group)  # type: ignore[assignment]
    whole.up = ColumnParallelLinear.from_module(whole.up, group=group)  # type: ignore[assignment]
    whole.down = RowParallelLinear.from_module(whole.down, group=group)  # type: ignore[assignment]
    return whole


class SplitRun:
    """tp ranks, and dp ranks that share the optimizer's state or keep it whole."""

    def __init__(
        self, axes: tuple[int, int], sharded: bool, model: nn.Module, group: _core.Group, lr: float
    ) -> None:
        mesh = Mesh({"dp": axes[0], "tp": axes[1]}, group=group)
        self.model = split(model, mesh["tp"])
        self.optimizer: torch.optim.Optimizer
        if sharded:
            self.optimizer = ShardedOptimizer(
                torch.optim.AdamW, self.model.parameters(), lr=lr, group=mesh["dp"]
            )
        else:
            self.optimizer = DistributedOptimizer(
                torch.optim.AdamW(self.model.parameters(), lr=lr), group=mesh["dp"]
            )
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(TOKENS).square().mean().backward()
            self.optimizer.step()


SPLITS = [((1, 2), False), ((1, 3), False), ((2, 2), False), ((2, 2), True), ((3, 1), True)]


@pytest.mark.parametrize(("axes", "sharded"), SPLITS)
def test_split_layers_go_to_other_numbers_of_ranks_and_back(
    axes: tuple[int, int], sharded: bool, tmp_path: Path
) -> None:
    first, second, end, through = (tmp_path / name for name in ("1", "2", "end", "through"))

    def undisturbed(group: _core.Group) -> dict[str, Any]:
        run = SplitRun(axes, sharded, ORDINARY, group, 0.01)
        run.train(3)
        checkpoint.save(first, run.state, group=group)
        weights = copy.deepcopy(whole_state_dict(run.model))
        run.train(3)
        checkpoint.save(end, run.state, group=group)
        return weights

    weights = run_ranks(axes[0] * axes[1], undisturbed)
    saved = checkpoint.read(first)
    for of_rank in weights:
        assert not list(differences(of_rank, saved["model"]))
    bare = torch.optim.AdamW(copy.deepcopy(ORDINARY).parameters())
    bare.load_state_dict(saved["optimizer"])
    for param, state in bare.state.items():
        assert state["exp_avg"].shape == param.shape

    def elsewhere(group: _core.Group) -> None:
        model = copy.deepcopy(OTHER_ORDINARY)
        optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
        checkpoint.load(first, {"model": model, "optimizer": optimizer}, group=group)
        checkpoint.save(second, {"model": model, "optimizer": optimizer}, group=group)

    run_ranks(1, elsewhere)
    for other_axes, other_sharded in SPLITS:

        def between(
            group: _core.Group, axes: tuple[int, int] = other_axes, sharded: bool = other_sharded
        ) -> None:
            run = SplitRun(axes, sharded, OTHER_ORDINARY, group, 7.0)
            checkpoint.load(second, run.state, group=group)
            checkpoint.save(through, run.state, group=group)

        run_ranks(other_axes[0] * other_axes[1], between)
        assert not list(differences(checkpoint.read(through), saved))

    def back(group: _core.Group) -> None:
        run = SplitRun(axes, sharded, OTHER_ORDINARY, group, 7.0)
        checkpoint.load(through, run.state, group=group)
        run.train(3)
        checkpoint.save(second, run.state, group=group)

    run_ranks(axes[0] * axes[1], back)
    assert not list(differences(checkpoint.read(second), checkpoint.read(end)))


def test_three_axes_and_a_divided_optimizer(tmp_path: Path) -> None:
    """dp 2 x pp 2 x tp 2, to one process, and back."""
    first, second, third = (tmp_path / name for name in "123")

    def block(seed: int) -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), seed)

    models = [nn.Sequential(block(seed), block(seed + 1)).double() for seed in range(3)]

    def state(group: _core.Group, number: int) -> dict[str, Any]:
        mesh = Mesh({"dp": 2, "pp": 2, "tp": 2}, group=group)
        model = copy.deepcopy(models[number])
        for part in model:
            part[0] = ColumnParallelLinear.from_module(part[0], group=mesh["tp"])
            part[2] = RowParallelLinear.from_module(part[2], group=mesh["tp"])
        pipeline = Pipeline(model, mse, micro_batches=2, group=mesh["pp"])
        optimizer = ShardedOptimizer(
            torch.optim.AdamW, pipeline.parameters(), lr=0.01 * (1 + number), group=mesh["dp"]
        )
        return {"model": pipeline, "optimizer": optimizer}

    def train(group: _core.Group) -> None:
        run = state(group, 0)
        x = torch.ones(4, 4, dtype=torch.float64)
        for _ in range(2):
            run["optimizer"].zero_grad()
            run["model"].step(x, 2 * x)
            run["optimizer"].step()
        checkpoint.save(first, run, group=group)

    def alone(group: _core.Group) -> None:
        model = models[1]
        run = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
        checkpoint.load(first, run, group=group)
        checkpoint.save(second, run, group=group)

    def back(group: _core.Group) -> None:
        run = state(group, 2)
        checkpoint.load(second, run, group=group)
        checkpoint.save(third, run, group=group)

    run_ranks(8, train)
    run_ranks(1, alone)
    run_ranks(8, back)
    saved = checkpoint.read(first)
    assert len(saved["optimizer"]["state"]) == 8
    assert not list(differences(checkpoint.read(second), saved))
    assert not list(differences(checkpoint.read(third), saved))


def test_state_without_a_value_for_each_element_is_refused_where_parameters_are_split(
    tmp_path: Path,
) -> None:
    def trained(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adafactor(model.parameters())
        model(TOKENS).sum().backward()
        optimizer.step()
        return optimizer

    def divided(group: _core.Group) -> None:
        model = split(ORDINARY, group)
        state = {"model": model, "optimizer": trained(model)}
        with pytest.raises(InvalidArgumentError, match=r"'optimizer\.state\..*_var' is a tensor"):
            checkpoint.save(tmp_path / "split", state, group=group)
        assert not list(tmp_path.glob("split*"))

    run_ranks(2, divided)

    def whole(group: _core.Group) -> None:
        model = copy.deepcopy(ORDINARY)
        optimizer = trained(model)
        checkpoint.save(tmp_path / "c", {"model": model, "optimizer": optimizer}, group=group)
        again = torch.optim.Adafactor(model.parameters())
        checkpoint.load(tmp_path / "c", {"model": model, "optimizer": again}, group=group)
        assert not list(differences(optimizer.state_dict(), again.state_dict()))

    run_ranks(2, whole)

    def load_split(group: _core.Group) -> None:
        model = split(ORDINARY, group)
        state = {"model": model, "optimizer": torch.optim.Adafactor(model.parameters())}
        with pytest.raises(InvalidArgumentError, match="split over ranks"):
            checkpoint.load(tmp_path / "c", state, group=group)

    run_ranks(2, load_split)


# --- buffers, extra state, dtypes -----------------------------------------------------------------


class Odd(nn.Module):
    """Every kind of entry: dtypes, memory orders, no elements, no dimensions, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.image = nn.Parameter(torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.turned = nn.Parameter(torch.rand(5, 7).t())
        self.again = self.turned
        self.scale = nn.Parameter(torch.rand(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.short = nn.Parameter(torch.rand(3, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.rand(2), requires_grad=False)
        self.register_buffer("flags", torch.rand(6) > 0.5)
        self.register_buffer("wave", torch.rand(3, dtype=torch.complex64))
        self.register_buffer("passing", torch.rand(2), persistent=False)
        self.calls = 3

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def loss(self) -> Tensor:
        params = [self.image, self.turned, self.scale, self.short.float()]
        return sum((p.square().sum() for p in params), torch.zeros(()))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_entries_of_every_kind(ranks: int, tmp_path: Path) -> None:
    original = seeded(Odd)
    assert isinstance(original, Odd)
    original.image.data[0, 0, 0, 0] = float("nan")

    def save(group: _core.Group) -> tuple[nn.Module, Any]:
        model = copy.deepcopy(original)
        model.calls = 10 + group.rank
        model.norm(torch.arange(12.0).reshape(4, 3) * (1 + group.rank))
        optimizer = ShardedOptimizer(torch.optim.Adam, model.parameters(), lr=0.1, group=group)
        model.loss().backward()
        optimizer.step()
        checkpoint.save(tmp_path / "c", {"model": model, "optimizer": optimizer}, group=group)
        return model, optimizer.full_state_dict()

    saved = run_ranks(ranks, save)
    model, full = saved[0]
    other = seeded(Odd, 1)

    def load(group: _core.Group) -> None:
        fresh = copy.deepcopy(other)
        optimizer = torch.optim.Adam(fresh.parameters(), lr=0.9)
        checkpoint.load(tmp_path / "c", {"model": fresh, "optimizer": optimizer}, group=group)
        assert fresh.calls == 10
        assert fresh.image.stride() == model.image.stride()
        for name, value in model.state_dict().items():
            if isinstance(value, Tensor):
                assert same(fresh.state_dict()[name], value), name
        # Averages are those of the lowest rank.
        assert not torch.equal(fresh.norm.running_mean, original.norm.running_mean)
        for number, state in full["state"].items():
            for key, value in state.items():
                assert same(optimizer.state_dict()["state"][number][key], value), (number, key)
        assert optimizer.state[fresh.image]["exp_avg"].stride() == fresh.image.stride()

    run_ranks(1, load)
    run_ranks(3, load)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(5), b.nan_to_num(5))


# --- param groups and names -----------------------------------------------------------------------


def linear(seed: int = 0) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), seed)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return optimizer


def alone(body: Callable[[_core.Group], Any]) -> Any:
    return run_ranks(1, body)[0]


def test_param_groups_may_be_divided_but_not_joined_where_they_differ(tmp_path: Path) -> None:
    model = linear()
    two = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = stepped(model, torch.optim.SGD(two, lr=0.1, momentum=0.9))
    path = tmp_path / "c"

    def run(group: _core.Group) -> None:
        checkpoint.save(path, {"model": model, "optimizer": optimizer}, group=group)
        each = [{"params": [param]} for param in model.parameters()]
        four = torch.optim.SGD(each, lr=3.0, momentum=0.5)
        checkpoint.load(path, {"model": model, "optimizer": four}, group=group)
        assert [g["lr"] for g in four.param_groups] == [0.1, 0.1, 0.5, 0.5]
        assert {g["momentum"] for g in four.param_groups} == {0.9}
        one = torch.optim.SGD(model.parameters(), lr=3.0)
        state = {"model": model, "optimizer": one}
        with pytest.raises(
            InvalidArgumentError, match=r"'0\.weight' and '1\.weight' in one param group.* lr"
        ):
            checkpoint.load(path, state, group=group)
        assert one.param_groups[0]["lr"] == 3.0 and not one.state

    alone(run)
    assert [g["lr"] for g in checkpoint.read(path)["optimizer"]["param_groups"]] == [0.1, 0.5]


def test_the_order_of_parameters_is_that_of_the_optimizer(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    backwards = stepped(model, torch.optim.Adam(reversed(list(model.parameters()))))

    def run(group: _core.Group) -> None:
        checkpoint.save(tmp_path / "c", {"m": model, "o": backwards}, group=group)

    alone(run)
    assert not list(differences(checkpoint.read(tmp_path / "c")["o"], backwards.state_dict()))


def test_names_come_from_modules_or_else_from_the_optimizer(tmp_path: Path) -> None:
    model = linear()
    path = tmp_path / "c"

    def run(group: _core.Group) -> None:
        nameless = stepped(model, torch.optim.Adam(model.parameters()))
        with pytest.raises(InvalidArgumentError, match=r"whose name is not known.\n  Pass the mod"):
            checkpoint.save(path, {"optimizer": nameless}, group=group)
        wrapped = DistributedOptimizer(nameless, model.named_parameters(), group=group)
        checkpoint.save(path, {"optimizer": wrapped}, group=group)
        named = torch.optim.Adam(model.named_parameters())
        checkpoint.load(path, {"optimizer": named}, group=group)
        assert not list(differences(named.state_dict()["state"], nameless.state_dict()["state"]))
        compiled = torch.compile(model)
        checkpoint.save(path, {"model": compiled, "optimizer": named}, group=group)
        assert "model.0.weight" in saved_names(path)

    alone(run)


def test_two_models_under_one_optimizer(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[dict[str, Any], torch.optim.Optimizer]:
        one, other = linear(seed), linear(seed + 1)
        optimizer = torch.optim.Adam([*one.parameters(), *other.parameters()])
        stepped(one, optimizer)
        stepped(other, optimizer)
        return {"one": one, "other": other, "optimizer": optimizer}, optimizer

    def run(group: _core.Group) -> None:
        state, optimizer = make(0)
        checkpoint.save(tmp_path / "c", state, group=group)
        fresh, its = make(5)
        checkpoint.load(tmp_path / "c", fresh, group=group)
        assert not list(differences(its.state_dict(), optimizer.state_dict()))

    alone(run)
    assert "optimizer.state.other.1.bias.exp_avg" in saved_names(tmp_path / "c")


def test_schedulers_scalers_and_values(tmp_path: Path) -> None:
    template = linear()
    rng_state = torch.get_rng_state()  # the ranks' threads share it

    def run(group: _core.Group) -> None:
        model = copy.deepcopy(template)
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9)
        scaler = GradScaler("cpu", init_scale=8.0, group=group)
        scaler.scale(torch.ones(()))
        scaler.update(4.0)
        big = torch.arange(1e6)
        state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        values = {"step": 7, "none": None, "part": big[:3], "rng": rng_state}
        stepped(model, optimizer)
        scheduler.step()
        checkpoint.save(tmp_path / "c", {**state, **values}, group=group)
        other = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.9))
        again = torch.optim.lr_scheduler.OneCycleLR(other, 0.2, total_steps=5)
        other_scaler = GradScaler("cpu", group=group)
        fresh = {"model": model, "optimizer": other, "scheduler": again, "scaler": other_scaler}
        found = checkpoint.load(tmp_path / "c", fresh, group=group)
        assert not list(differences(found, values))
        assert other_scaler.get_scale() == 4.0
        assert not list(differences(again.state_dict(), scheduler.state_dict()))
        assert not list(differences(other.state_dict(), optimizer.state_dict()))
        # Asked for by name, too; and a part of what there is.
        part = checkpoint.load(tmp_path / "c", {"step": 0}, partial=True, group=group)
        assert not list(differences(part, values))

    run_ranks(2, run)
    assert sum(file.stat().st_size for file in (tmp_path / "c").iterdir()) < 1e6


# --- torch's own tools ----------------------------------------------------------------------------


def test_torch_reads_it(tmp_path: Path) -> None:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = linear()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), lr=0.25))
    path = tmp_path / "c"

    def save(group: _core.Group) -> None:
        state = {"model": model, "optimizer": optimizer, "step": 3}
        checkpoint.save(path, state, group=group)

    run_ranks(2, save)
    dcp_to_torch_save(path, tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert found.keys() == {"model", "optimizer", "step", "pycomm"} and found["step"] == 3
    assert not list(differences(found["model"], dict(model.state_dict())))

    fresh = linear(1)
    its_optimizer = torch.optim.AdamW(fresh.parameters())
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    flat = get_optimizer_state_dict(fresh, its_optimizer, options=options)
    assert flat.keys() == found["optimizer"].keys()
    into = {"model": fresh.state_dict(), "optimizer": flat}
    dcp.load(into, checkpoint_id=path)
    set_optimizer_state_dict(fresh, its_optimizer, into["optimizer"], options=options)
    assert not list(differences(dict(fresh.state_dict()), dict(model.state_dict())))
    assert not list(differences(its_optimizer.state_dict(), optimizer.state_dict()))


class HalfEmptyRun:
    """The second stage has no biases, and the third param group no parameters anywhere."""

    def __init__(self, group: _core.Group, lr: float) -> None:
        layers = [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)]
        for layer in layers:
            nn.init.constant_(layer.weight, 0.25)
        nn.init.ones_(layers[0].bias)
        self.model: nn.Module | Pipeline = nn.Sequential(*layers).double()
        if group.size > 1:
            self.model = Pipeline(self.model, mse, micro_batches=1, group=group)
        params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in params if p.dim() > 1]},
                {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
                {"params": [], "lr": lr / 2},
            ],
            lr=lr,
        )
        # It computes an lr from the last one.
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 9)
        self.state = {"m": self.model, "o": self.optimizer, "s": self.scheduler}

    def train(self, steps: int) -> None:
        x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        for _ in range(steps):
            self.optimizer.zero_grad()
            if isinstance(self.model, Pipeline):
                self.model.step(x, x)
            else:
                mse(self.model(x), x).backward()
            self.optimizer.step()
            self.scheduler.step()


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 2), (2, 2), (2, 1)])
def test_a_group_without_parameters_on_a_rank_goes_on_like_the_others(
    source: int, target: int, tmp_path: Path
) -> None:
    """Its lr was that of a new run: ranks then had schedulers that differ, which save refuses."""

    def body(group: _core.Group, path: Path, steps: int, origin: Path | None) -> list[float]:
        run = HalfEmptyRun(group, 0.125 if origin is None else 7.0)
        if origin is not None:
            checkpoint.load(origin, run.state, group=group)
        run.train(steps)
        checkpoint.save(path, run.state, group=group)
        return [param_group["lr"] for param_group in run.optimizer.param_groups]

    whole = run_ranks(1, lambda group: body(group, tmp_path / "whole", 6, None))
    run_ranks(source, lambda group: body(group, tmp_path / "half", 3, None))
    lrs = run_ranks(target, lambda group: body(group, tmp_path / "end", 3, tmp_path / "half"))
    assert lrs == whole * target
    saved = checkpoint.read(tmp_path / "end")
    assert not list(differences(saved, checkpoint.read(tmp_path / "whole")))
    assert [len(group["params"]) for group in saved["o"]["param_groups"]] == [2, 1, 0]
    plain = run_ranks(1, lambda group: HalfEmptyRun(group, 7.0))[0]
    plain.optimizer.load_state_dict(saved["o"])
    assert [group["lr"] for group in plain.optimizer.param_groups] == lrs[0]


def test_a_group_without_parameters_keeps_its_options_if_there_were_other_groups(
    tmp_path: Path,
) -> None:
    model = linear()

    def optimizer(empty: int, lr: float) -> torch.optim.Optimizer:
        groups = [{"params": [*model.parameters()]}, *({"params": []} for _ in range(empty))]
        return torch.optim.AdamW(groups, lr=lr)

    path = tmp_path / "c"
    alone(lambda group: checkpoint.save(path, {"m": model, "o": optimizer(1, 0.5)}, group=group))
    for empty, expected in ((1, [0.5, 0.5]), (2, [0.5, 7.0, 7.0]), (0, [0.5])):
        other = optimizer(empty, 7.0)
        state = {"m": model, "o": other}
        alone(lambda group, state=state: checkpoint.load(path, state, group=group))
        assert [group["lr"] for group in other.param_groups] == expected


# --- the group of the call ------------------------------------------------------------------------


def test_a_group_without_all_parts_is_refused(tmp_path: Path) -> None:
    """It kept one stage, and said nothing."""
    path = tmp_path / "c"
    pair = r"\[\d, \d\]"

    def within(state: dict[str, Any], group: _core.Group, pattern: str) -> None:
        for call in (checkpoint.save, checkpoint.load):
            with pytest.raises(InvalidArgumentError, match=pattern + r"(.|\n)*that has all of the"):
                call(path, state, group=group)
        group.barrier()

    def body(group: _core.Group) -> None:
        mesh = Mesh({"dp": 2, "pp": 2}, group=group)
        layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        pipeline = Pipeline(layers, mse, micro_batches=1, group=mesh["pp"])
        within({"m": pipeline}, mesh["dp"], f"'m' is a Pipeline over ranks {pair}, and the group")
        divided = nn.Sequential(ColumnParallelLinear(2, 2, group=mesh["pp"]))
        within({"m": divided}, mesh["dp"], f"'m' has layers split over ranks {pair}, and the gr")
        own = nn.Parameter(torch.zeros(4))
        sgd = ShardedOptimizer(torch.optim.SGD, [("w", own)], group=mesh["pp"])
        within({"o": sgd}, mesh["dp"], f"'o' is a ShardedOptimizer over ranks {pair}, and the gr")

    run_ranks(4, body)
    assert not list(tmp_path.iterdir())
