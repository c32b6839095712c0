"""Ranks with different numbers of batches."""

import re

import pytest
import torch
from run_ranks import RankError, run_ranks
from torch import Tensor, nn

from pycomm import _core
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.join import join
from pycomm.optimizer import DistributedOptimizer


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: nn.Module, batches: list[int], group: _core.Group, divide_by: str) -> dict:
    optimizer = DistributedOptimizer(
        make_optimizer(model), model.named_parameters(), group=group, bucket_cap_bytes=32
    )
    with join(model, divide_by=divide_by, group=group):
        for step in range(batches[group.rank]):
            optimizer.zero_grad()
            model(batch(step, group.rank)).square().mean().backward()
            optimizer.step()
    # Uneven batches are over: ordinary passes work again.
    optimizer.zero_grad()
    model(batch(99, group.rank)).square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def train_alone(batches: list[int], divide_by: str) -> tuple[nn.Module, dict]:
    """Each rank's batch-norm statistics are its own, until the last active rank gives its."""
    ranks = range(len(batches))
    model = make_model()
    optimizer = make_optimizer(model)
    buffers = [{k: v.clone() for k, v in model.named_buffers()} for _ in ranks]

    def step(number: int, active: list[int], divisor: int) -> None:
        total = None
        for rank in ranks:
            grads = [torch.zeros_like(param) for param in model.parameters()]
            if rank in active:
                for name, buffer in model.named_buffers():
                    buffer.copy_(buffers[rank][name])
                model.zero_grad()
                model(batch(number, rank)).square().mean().backward()
                grads = [param.grad for param in model.parameters()]
                buffers[rank] = {k: v.clone() for k, v in model.named_buffers()}
            total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        for param, grad in zip(model.parameters(), total, strict=True):
            param.grad = grad / divisor
        optimizer.step()

    for number in range(max(batches)):
        active = [rank for rank in ranks if number < batches[rank]]
        step(number, active, len(active) if divide_by == "active" else len(batches))
        last = active[0]
    buffers = [buffers[last] for _ in ranks]
    step(99, list(ranks), len(batches))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[0][name])
    return model, optimizer.state_dict()


@pytest.mark.parametrize("divide_by", ["active", "world"])
@pytest.mark.parametrize("batches", [[2, 5, 3], [3, 3], [0, 2], [4, 1, 1, 2]])
def test_uneven_batches_equal_one_process(batches: list[int], divide_by: str) -> None:
    replicas = [make_model() for _ in batches]
    states = run_ranks(
        len(batches), lambda group: train(replicas[group.rank], batches, group, divide_by)
    )
    expected, expected_state = train_alone(batches, divide_by)
    for rank, (replica, state) in enumerate(zip(replicas, states, strict=True)):
        for (name, param), reference in zip(
            replica.named_parameters(), expected.parameters(), strict=True
        ):
            assert torch.equal(param, reference), f"{name} on rank {rank}"
        for index, values in expected_state["state"].items():
            for key, value in values.items():
                assert torch.equal(state["state"][index][key], value), f"{key} on rank {rank}"
    # Rank 0's statistics went on from the last active rank's.
    for (name, buffer), reference in zip(
        replicas[0].named_buffers(), expected.buffers(), strict=True
    ):
        assert torch.equal(buffer, reference), name


def test_two_optimizers_join_and_closures_average_over_active_ranks() -> None:
    def run(group: _core.Group) -> list[float]:
        a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        optimizers = {
            param: DistributedOptimizer(torch.optim.SGD([param], lr=1.0), group=group)
            for param in (a, b)
        }
        losses = []
        with join(group=group):
            for _ in range(group.rank + 1):
                for param, optimizer in optimizers.items():

                    def closure(param=param, optimizer=optimizer) -> Tensor:
                        optimizer.zero_grad()
                        loss = (param * 0.0 + group.rank).sum()
                        loss.backward()
                        return loss

                    losses.append(optimizer.step(closure).item())
        return losses

    # Round by round, ranks 0..2, 1..2 and 2 are active.
    expected = [1.0, 1.0, 1.5, 1.5, 2.0, 2.0]
    assert run_ranks(3, run) == [expected[: 2 * (rank + 1)] for rank in range(3)]


def test_a_rank_may_finish_with_unsynchronised_gradients_and_train_on() -> None:
    def run(group: _core.Group) -> float:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), group=group)
        with join(group=group):
            if group.rank == 0:
                with optimizer.no_sync():
                    (weight * 7).backward()
            else:
                (weight * 1).backward()
                optimizer.step()
        assert weight.item() == 0.0
        optimizer.zero_grad()
        (weight * 2 * (group.rank + 1)).backward()
        return weight.grad.item()

    assert run_ranks(2, run) == [3.0, 3.0]


def test_active_ranks_that_do_different_things_all_raise() -> None:
    def run(group: _core.Group) -> str:
        params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        optimizers = [DistributedOptimizer(torch.optim.SGD([p]), group=group) for p in params]

        def train() -> None:
            with join(group=group):
                if group.rank < 2:
                    params[group.rank].backward()

        with pytest.raises(MismatchError) as caught:
            train()
        assert len(optimizers) == 2
        return str(caught.value)

    for error in run_ranks(3, run):
        assert re.search(
            r"rank 0 announces backward 1 .*optimizer 0 and rank 1 .* optimizer 1", error
        ), error


def test_a_block_left_by_an_exception_ends_at_once() -> None:
    def run(group: _core.Group) -> None:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), group=group)
        with pytest.raises(ZeroDivisionError), join(group=group):
            raise ZeroDivisionError
        weight.backward()
        optimizer.step()

    run_ranks(2, run)


def test_a_world_of_one_joins_nobody() -> None:
    def run(group: _core.Group) -> float:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), group=group)
        with join(group=group):
            weight.backward()
            optimizer.step()
        return weight.item()

    assert run_ranks(1, run) == [0.0]


def test_misuse_is_refused() -> None:
    def run(group: _core.Group) -> None:
        with (
            pytest.raises(InvalidArgumentError, match="divide_by is 'ranks'"),
            join(divide_by="ranks", group=group),
        ):
            pass
        with (
            join(group=group),
            pytest.raises(InvalidArgumentError, match="already open"),
            join(group=group),
        ):
            pass

    run_ranks(2, run)


def test_a_dropped_optimizer_that_others_still_use_is_named() -> None:
    def run(group: _core.Group) -> None:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight], lr=1.0), group=group)
        with join(group=group):
            if group.rank == 0:
                del optimizer
            else:
                weight.backward()

    with pytest.raises(RankError, match=r"rank 0 .*optimizer 0, which this rank has dropped"):
        run_ranks(2, run)


def test_what_steps_with_the_batches_is_the_same_everywhere_afterwards() -> None:
    def body(group: _core.Group) -> list[float]:
        model = make_model()
        optimizer = DistributedOptimizer(
            make_optimizer(model), model.named_parameters(), group=group
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        with join(model, schedule, group=group):
            for step in range(3 + group.rank):
                optimizer.zero_grad()
                model(batch(step, group.rank)).sum().backward()
                optimizer.step()
                schedule.step()
        optimizer.zero_grad()
        model(batch(9, group.rank)).sum().backward()
        optimizer.step()
        schedule.step()
        assert schedule.last_epoch == 5
        return [
            *schedule.get_last_lr(),
            *torch.cat([p.flatten() for p in model.parameters()]).tolist(),
        ]

    first, second = run_ranks(2, body)
    assert first == second


def test_an_optimizer_that_one_rank_has_dropped_is_left_alone() -> None:
    def body(group: _core.Group) -> list[float]:
        dropped = make_model()
        kept = [
            DistributedOptimizer(make_optimizer(dropped), dropped.named_parameters(), group=group)
        ]
        if group.rank == 0:
            kept.clear()
        model = make_model()
        optimizer = DistributedOptimizer(
            make_optimizer(model), model.named_parameters(), group=group
        )
        with join(model, group=group):
            for step in range(1 + group.rank):
                optimizer.zero_grad()
                model(batch(step, group.rank)).sum().backward()
                optimizer.step()
        return torch.cat([param.flatten() for param in model.parameters()]).tolist()

    first, second = run_ranks(2, body)
    assert first == second
