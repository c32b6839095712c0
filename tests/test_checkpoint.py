"""A run saved in one layout goes on in any other, to the bits of a run that was never stopped."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_ranks import run_ranks
from test_pipeline import batches, block_model
from torch import Tensor, nn

from pycomm import (
    DistributedOptimizer,
    InvalidArgumentError,
    Mesh,
    ReduceOp,
    ShardedOptimizer,
    _core,
    broadcast_optimizer_state,
    broadcast_parameters,
    checkpoint,
)
from pycomm.pipeline import Pipeline

mse = nn.functional.mse_loss
MICRO_BATCHES = 4
SAVED_AT, END = 3, 6


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks along axes, and how many of them share the optimizer's state."""

    dp: int = 1
    pp: int = 1
    sharded: bool = False
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        return self.dp * self.pp

    def __str__(self) -> str:
        kind = "zero" if self.sharded else "dp"
        return f"{kind}{self.dp}-pp{self.pp}" + ("-" + self.schedule) * (self.schedule != "1f1b")


LAYOUTS = [
    Layout(),
    Layout(dp=2),
    Layout(pp=2),
    Layout(dp=2, pp=2),
    Layout(dp=4),
    Layout(pp=4),
    Layout(pp=2, schedule="interleaved"),
    Layout(sharded=True),
    Layout(dp=2, sharded=True),
    Layout(dp=3, sharded=True),
    Layout(dp=4, sharded=True),
    Layout(dp=2, pp=2, sharded=True),
]

# The first test shows that the others write the same.
SOURCES = [
    Layout(),
    Layout(dp=2, pp=2),
    Layout(dp=3, sharded=True),
]


class Run:
    """A rank's part of a training run.

    Data-parallel replicas get the same batches where their gradients are averaged, and the first
    one alone gets any where they are summed: either is exact, so all layouts compute the same bits.
    """

    def __init__(self, layout: Layout, group: _core.Group, *, fresh: bool = False) -> None:
        model = copy.deepcopy(OTHER_MODEL if fresh else MODEL)
        mesh = Mesh({"dp": layout.dp, "pp": layout.pp}, group=group)
        self.group = group
        self.model: nn.Module | Pipeline = model
        if layout.pp > 1:
            self.model = Pipeline(
                model,
                mse,
                micro_batches=MICRO_BATCHES,
                schedule=layout.schedule,
                group=mesh["pp"],
            )
        self._trains = mesh.coordinate["dp"] == 0 or not layout.sharded or layout.pp > 1
        groups = param_groups(self.model)
        options = {"lr": 7.0 if fresh else 0.01}
        self.optimizer: torch.optim.Optimizer
        if layout.sharded:
            op = ReduceOp.AVG if layout.pp > 1 else ReduceOp.SUM
            self.optimizer = ShardedOptimizer(
                torch.optim.AdamW, groups, group=mesh["dp"], op=op, **options
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, **options)
            if layout.dp > 1:
                passes = 1 if layout.pp > 1 else MICRO_BATCHES
                self.optimizer = DistributedOptimizer(
                    self.optimizer, group=mesh["dp"], backward_passes_per_step=passes
                )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def train(self, begin: int, end: int) -> None:
        for x, y in DATA[begin:end]:
            self.optimizer.zero_grad()
            if isinstance(self.model, Pipeline):
                self.model.step(x, y)
            elif self._trains:
                accumulate(self.model, x, y)
            self.optimizer.step()
            self.scheduler.step()


def param_groups(model: nn.Module | Pipeline) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0},
    ]


def accumulate(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        (mse(model(part), target) * (1 / MICRO_BATCHES)).backward()


MODEL, OTHER_MODEL = block_model(4), block_model(4, seed=1)
DATA = batches(8, END)


@dataclasses.dataclass(frozen=True)
class Alone:
    """What one process has that was never stopped."""

    saved: dict[str, Any]
    end: dict[str, Any]


def whole_state(run: Run) -> dict[str, Any]:
    return copy.deepcopy({name: thing.state_dict() for name, thing in run.state.items()})


@pytest.fixture(scope="module")
def alone() -> Alone:
    def train(group: _core.Group) -> Alone:
        run = Run(Layout(), group)
        run.train(0, SAVED_AT)
        saved = whole_state(run)
        run.train(SAVED_AT, END)
        return Alone(saved, whole_state(run))

    return run_ranks(1, train)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """A checkpoint after three steps, written by each layout."""
    written = {}
    for layout in LAYOUTS:
        path = tmp_path_factory.mktemp("checkpoints") / str(layout)

        def train(group: _core.Group, layout: Layout = layout, path: Path = path) -> None:
            run = Run(layout, group)
            run.train(0, SAVED_AT)
            state = {**run.state, "step": SAVED_AT, "notes": {1: ("a", None), "b": torch.ones(2)}}
            checkpoint.save(path, state, group=group)

        run_ranks(layout.ranks, train)
        written[layout] = path
    return written


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested states differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{where}: {list(a)} and {list(b)}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (mine, its) in enumerate(zip(a, b, strict=True)):
            yield from differences(mine, its, f"{where}[{number}]")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{where}: {a} and {b}"
    elif type(a) is not type(b) or a != b:
        yield f"{where}: {a!r} and {b!r}"


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_one_process_reads_what_it_would_have_saved_itself(
    source: Layout, folders: dict[Layout, Path], alone: Alone
) -> None:
    found = checkpoint.read(folders[source])
    assert found.pop("step") == SAVED_AT
    assert not list(differences(found.pop("notes"), {1: ("a", None), "b": torch.ones(2)}))
    assert not list(differences(found, alone.saved))
    # The plain objects take it.
    model = copy.deepcopy(OTHER_MODEL)
    model.load_state_dict(found["model"])
    torch.optim.AdamW(param_groups(model)).load_state_dict(found["optimizer"])


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_training_goes_on_in_another_layout_to_the_same_bits(
    target: Layout, folders: dict[Layout, Path], alone: Alone, tmp_path: Path
) -> None:
    for source in SOURCES:

        def go_on(group: _core.Group, source: Layout = source) -> None:
            run = Run(target, group, fresh=True)
            values = checkpoint.load(folders[source], run.state, group=group)
            assert values.keys() == {"step", "notes"} and values["step"] == SAVED_AT
            run.train(values["step"], END)
            checkpoint.save(tmp_path / str(source), run.state, group=group)

        run_ranks(target.ranks, go_on)
        found = checkpoint.read(tmp_path / str(source))
        assert not list(differences(found, alone.end)), f"{source} to {target}"


def test_each_element_is_written_once(folders: dict[Layout, Path]) -> None:
    """Replicas share the writing: none has more than the tensor's granularity allows."""
    sizes = {
        layout: [file.stat().st_size for file in sorted(path.glob("*.distcp"))]
        for layout, path in folders.items()
    }
    once = sum(sizes[Layout()])
    four = sizes[Layout(dp=4)]
    assert len(four) == 4
    assert sum(four) == pytest.approx(once, rel=0.01)
    assert max(four) < 0.35 * once


def test_replicas_that_differ_are_refused_unless_one_of_each_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "c"
    models = [nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(3)]
    for model in models:
        model.load_state_dict(models[0].state_dict())

    def save(group: _core.Group) -> None:
        model = models[group.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad()
            factor = group.rank if step else 1
            (model[0].weight * factor).sum().backward()
            optimizer.step()
        state = {"model": model, "optimizer": optimizer}
        model[1].running_mean += group.rank  # that of the lowest rank is saved
        with pytest.raises(InvalidArgumentError) as error:
            checkpoint.save(path, state, group=group)
        text = str(error.value)
        assert "'model.0.weight' (ranks 0 and " in text, text
        assert "0.weight.momentum_buffer' (ranks 0 and " in text, text
        assert "bias" not in text and "running_mean" not in text and "verify=False" in text, text
        checkpoint.save(path, state, group=group, verify=False)
        broadcast_parameters(model, group=group)
        broadcast_optimizer_state(optimizer, group=group)
        checkpoint.save(path, state, group=group)

    run_ranks(3, save)
