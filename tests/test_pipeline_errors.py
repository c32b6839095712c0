"""What cannot work says so, on every rank, and no rank waits for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launchers import mpirun
from run_ranks import run_ranks
from test_pipeline import batches, block_model
from torch import Tensor, nn

from pycomm import (
    DistributedOptimizer,
    InvalidArgumentError,
    MismatchError,
    PeerLostError,
    StageError,
    _core,
)
from pycomm.pipeline import Pipeline, Stash, Take

mse = nn.functional.mse_loss


def errors_of(ranks: int, attempt: Callable[[_core.Group], Any]) -> list[Exception]:
    """What each rank's attempt raises; every one must."""

    def run(group: _core.Group) -> Exception:
        try:
            attempt(group)
        except Exception as error:
            return error
        raise AssertionError(f"rank {group.rank} raised nothing")

    return run_ranks(ranks, run)


def refused(make: Callable[[_core.Group], Any], pattern: str, ranks: int = 2) -> None:
    """On every rank, before anything is sent: the group stays usable."""

    def attempt(group: _core.Group) -> None:
        with pytest.raises(InvalidArgumentError, match=pattern) as caught:
            make(group)
        group.barrier()
        raise caught.value

    for rank, error in enumerate(errors_of(ranks, attempt)):
        assert re.search(pattern, str(error)), f"rank {rank}: {error}"


def pipeline(group: _core.Group, model: Any = None, **options: Any) -> Pipeline:
    options = {"micro_batches": 4, "group": group, **options}
    return Pipeline(block_model() if model is None else model, mse, **options)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"stages": 10}, r"10 stages, and the model has 8 layers(.|\n)*at most 8"),
        ({"stages": 3}, r"3 stages on 2 ranks(.|\n)*Use 4 stages"),
        ({"stages": 0}, r"stages is 0"),
        ({"stages": [3, 4]}, r"\[3, 4\], 7 layers in all, and the model has 8"),
        ({"stages": [8, 0]}, r"at least one layer"),
        ({"stages": "two"}, r"stages is 'two'"),
        ({"stages": 4, "schedule": "gpipe"}, r"one stage on each rank(.|\n)*interleaved"),
        ({"schedule": "1F1B"}, r"schedule is '1F1B'(.|\n)*'1f1b'"),
        ({"micro_batches": 0}, r"micro_batches is 0"),
        ({"micro_batches": 2.5}, r"micro_batches is 2\.5"),
        ({"balance": "time"}, r"balance is 'time'"),
        ({"balance": "measured_seconds"}, r"no sample"),
        ({"balance": "measured_seconds", "sample": torch.ones(3)}, r"failed on rank 0: RuntimeErr"),
        ({"loss_reduction": "none"}, r"loss_reduction is 'none'"),
        ({"model": nn.Linear(1, 1)}, r"model is a Linear"),
        ({"model": [nn.Linear(1, 1)] * 2, "stages": 4}, r"stages is 4, and .* given as 2"),
        ({"model": [None, None]}, r"stage 0 is mine, and its module is None"),
        ({"model": nn.Sequential()}, r"has 0 layers"),
        ({"model": nn.Sequential(Stash("a"), nn.Tanh())}, r'Take\("a"\) in no stage'),
        ({"model": nn.Sequential(nn.Tanh(), Take("a"))}, r'Stash\("a"\) is in no stage'),
        ({"model": nn.Sequential(Take("a"), Stash("a"))}, r"to a later one"),
        ({"model": nn.Sequential(Stash("a"), Stash("a"))}, r'Stash\("a"\) is in stage 0 and in'),
        ({"ties": [("embedding", "1.a")]}, r"ties has 'embedding'"),
        ({"ties": [("0.weight", "1.7.weight")]}, r"ties names 'weight' in stage 0"),
    ],
)
def test_arguments_that_make_no_pipeline(options: dict[str, Any], pattern: str) -> None:
    refused(lambda group: pipeline(group, **options), pattern)


@pytest.mark.parametrize(
    ("differing", "pattern"),
    [
        ({"micro_batches": 8}, r"micro_batches is (4|8) on rank \d and (4|8) on rank \d"),
        ({"schedule": "gpipe"}, r"schedule is '(1f1b|gpipe)' on rank \d and '(1f1b|gpipe)'"),
        ({"stages": [1, 7]}, r"stages is"),
        ({"model": block_model(9)}, r"the model is 'nn.Sequential of (8|9) layers"),
        ({"ties": [("0.0.weight", "1.7.weight")]}, r"stages share"),
    ],
)
def test_arguments_that_differ_between_ranks(differing: dict[str, Any], pattern: str) -> None:
    def attempt(group: _core.Group) -> None:
        pipeline(group, **(differing if group.rank == 1 else {}))

    errors = errors_of(2, attempt)
    assert all(isinstance(error, MismatchError | InvalidArgumentError) for error in errors)
    assert any(re.search(pattern, str(error)) for error in errors), errors


@pytest.mark.parametrize(
    ("batch", "target", "pattern"),
    [
        (torch.ones(3, 5), torch.ones(3, 3), r"3 rows and is cut into 4(.|\n)*drop_last"),
        (torch.ones(8, 5), torch.ones(7, 3), r"rank 0 has 8 rows and the target on rank 1 has 7"),
        (None, torch.ones(8, 3), r"rank 0, which has the first stage, was given no batch"),
        ((torch.ones(8), torch.ones(9)), torch.ones(8), r"tensors of batch have 8, 9 rows"),
    ],
)
def test_data_that_makes_no_step(batch: Any, target: Any, pattern: str) -> None:
    refused(lambda group: pipeline(group).step(batch, target), pattern)
    refused(lambda group: pipeline(group).evaluate(batch, target), pattern)


def test_a_step_on_one_rank_and_an_evaluation_on_another() -> None:
    x, y = batches(8, 1)[0]

    def attempt(group: _core.Group) -> None:
        mine = pipeline(group)
        if group.rank == 0:
            mine.step(x, y)
        else:
            mine.evaluate(x, y)

    for error in errors_of(2, attempt):
        assert isinstance(error, MismatchError)
        assert "Pipeline.step" in str(error) and "Pipeline.evaluate" in str(error)


class Failing(nn.Module):
    """Fails in the forward or the backward of its fourth call."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 4 and self.when == "forward":
            raise ValueError("a bad day")
        if self.calls == 4 and self.when == "backward":
            x.register_hook(self._fail)
        return x

    def _fail(self, gradient: Tensor) -> None:
        raise ValueError("a bad day")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero_bubble"])
@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_stage_that_raises_ends_the_step_everywhere(
    failing: int, when: str, schedule: str
) -> None:
    x, y = batches(8, 1)[0]

    def attempt(group: _core.Group) -> None:
        stages: list[nn.Module] = [nn.Linear(5, 5).double() for _ in range(3)]
        stages[failing] = nn.Sequential(stages[failing], Failing(when))
        mine = pipeline(group, stages, schedule=schedule)
        try:
            # What a rank has to do may be over by then: it hears of it in its next step.
            for _ in range(2):
                mine.step(x, torch.ones(8, 5).double())
        except Exception:
            with pytest.raises(PeerLostError):
                mine.step(x, y)  # finished
            raise

    errors = errors_of(3, attempt)
    for rank, error in enumerate(errors):
        where = rf"of micro-batch 3 in stage {failing} of 3, on rank {failing}"
        assert re.search(where + r": ValueError: a bad day", str(error)), f"rank {rank}: {error}"
        assert isinstance(error, StageError if rank == failing else PeerLostError)
    assert isinstance(errors[failing].__cause__, ValueError)


def test_a_stage_that_refuses_what_the_one_before_it_gives() -> None:
    x, y = batches(8, 1)[0]
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(3, 3)).double()
    errors = errors_of(2, lambda group: pipeline(group, model).step(x, y))
    for error in errors:
        assert re.search(
            r"forward of micro-batch 0 in stage 1 of 2, on rank 1: RuntimeError: mat1(.|\n)*"
            r"given what stage 0 returns, float64 \(2, 4\)",
            str(error),
        ), error
    assert isinstance(errors[1], StageError) and isinstance(errors[0], PeerLostError)


@pytest.mark.parametrize(
    ("output", "pattern"),
    [
        (lambda x: {"set": {1, 2}}, r"holds a set, which cannot travel"),
        (lambda x: x.to_sparse(), r"sparse_coo tensor"),
    ],
)
def test_what_cannot_travel(output: Callable[[Tensor], Any], pattern: str) -> None:
    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output(x)

    x, y = batches(8, 1)[0]
    errors = errors_of(2, lambda group: pipeline(group, [Strange(), nn.Tanh()]).step(x, y))
    for error in errors:
        assert re.search(pattern, str(error)) and "stage 0" in str(error), error


@pytest.mark.parametrize(
    "loss_fn", [lambda output, target: output, lambda output, target: 3.0, lambda output: output]
)
def test_a_loss_that_is_not_one_number(loss_fn: Callable[..., Any]) -> None:
    x, y = batches(8, 1)[0]

    def attempt(group: _core.Group) -> None:
        Pipeline(block_model(), loss_fn, micro_batches=2, group=group).step(x, y)

    for error in errors_of(2, attempt):
        assert re.search(r"stage 1 of 2, on rank 1: TypeError", str(error)), error


def test_gradients_of_an_earlier_step_are_not_summed_twice() -> None:
    embedding = nn.Linear(5, 5).double()
    model = nn.Sequential(embedding, nn.Tanh(), nn.Tanh(), embedding)
    x = torch.ones(8, 5).double()

    def attempt(group: _core.Group) -> None:
        mine = pipeline(group, model)
        mine.step(x, x)
        mine.step(x, x)

    for error in errors_of(2, attempt):
        assert re.search(r"shared between stages, has a gradient(.|\n)*zero_grad", str(error))


KILLED = """
    import os, signal, sys, time
    import torch, pycomm
    pycomm.init()
    torch.set_num_threads(1)
    schedule = sys.argv[1]

    class Killed(torch.nn.Module):
        calls = 0
        def forward(self, x):
            Killed.calls += 1
            if Killed.calls == 6:
                print("killed at", time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            return x

    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    layers[1] = torch.nn.Sequential(layers[1], Killed())
    pipeline = pycomm.pipeline.Pipeline(
        layers, torch.nn.functional.mse_loss, schedule=schedule, micro_batches=4
    )
    x = torch.ones(8, 8)
    try:
        for _ in range(3):
            pipeline.step(x, x)
    except pycomm.PeerLostError as error:
        print(f"rank {pycomm.rank()} at {time.time()}: {error}", flush=True)
        raise
"""


@pytest.mark.parametrize("schedule", ["1f1b"])
def test_a_rank_killed_in_a_step_is_named_by_the_others(schedule: str) -> None:
    done = mpirun(3, KILLED, schedule)
    assert done.returncode != 0
    killed = re.search(r"killed at ([\d.]+)", done.out)
    assert killed, done.err
    heard = re.findall(r"rank (\d) at ([\d.]+): (.*)", done.out)
    assert {rank for rank, _, _ in heard} <= {"0", "2"} and heard, done.out + done.err
    for rank, when, text in heard:
        assert float(when) - float(killed[1]) < 30, f"rank {rank}"
        assert "of micro-batch" in text and "rank 1 is gone" in text


def test_optimizers_over_ranks_with_other_stages_are_refused() -> None:
    """They would add up gradients of parameters that have nothing to do with each other."""

    def attempt(group: _core.Group) -> None:
        mine = pipeline(group, nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)))
        DistributedOptimizer(torch.optim.SGD(mine.parameters(), lr=0.1), group=group)

    refused(attempt, r"a stage's of a pipeline, of which ranks \[0, 1\](.|\n)*group=mesh\[")


def test_a_batch_without_tensors() -> None:
    def attempt(group: _core.Group) -> None:
        pipeline(group).step([1, 2, 3], torch.ones(4, 3))

    refused(attempt, "the batch is a list without a tensor that has rows")
