"""DistributedOptimizer as an optimizer: the same training as in one process, and its interface."""

import copy
import io
import re
import threading

import pytest
import torch
from launchers import mpirun
from parity import assert_same_parameters, fold, train_alone, train_on_ranks
from run_ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.nn import functional

from pycomm import _core
from pycomm._core import ReduceOp
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.optimizer import DistributedOptimizer

STEPS = 5
TINY_BUCKET_BYTES = 256  # several buckets even here


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def convolution() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
    )


class Transformer(nn.Module):
    """Embedding and output share one weight; a branch is used on odd ranks only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.odd_branch = nn.Linear(8, 8)
        self.never_used = nn.Linear(8, 8)
        self.output = nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, odd: bool) -> Tensor:
        hidden = self.block(self.embedding(tokens))
        return self.output(self.odd_branch(hidden) if odd else hidden)


def image_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    images = draw(3, 1, 8, 8, dtype=dtype, seed=100 * step + rank)
    return functional.cross_entropy(model(images), torch.arange(3) + step % 7)


def token_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(100 * step + rank))
    return functional.cross_entropy(model(tokens, odd=rank % 2 == 1).transpose(1, 2), tokens)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def linear_loss(model: nn.Module, step: int, rank: int) -> Tensor:
    return model(draw(4, 3, seed=10 * step + rank)).square().mean()


# --- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_training_a_convolution_equals_one_process(world_size: int, make_optimizer) -> None:
    trained = train_on_ranks(
        convolution(),
        make_optimizer,
        image_loss,
        world_size,
        STEPS,
        bucket_cap_bytes=TINY_BUCKET_BYTES,
    )
    alone = train_alone(convolution(), make_optimizer, image_loss, world_size, STEPS)
    assert_same_parameters(trained, alone)


@pytest.mark.parametrize("bucket_cap_bytes", [1, 600, 1 << 20])
@pytest.mark.parametrize("overlap", [True, False])
def test_tied_and_unused_weights_equal_one_process(bucket_cap_bytes: int, overlap: bool) -> None:
    trained = train_on_ranks(
        Transformer(),
        adamw,
        token_loss,
        3,
        STEPS,
        bucket_cap_bytes=bucket_cap_bytes,
        overlap=overlap,
    )
    assert_same_parameters(trained, train_alone(Transformer(), adamw, token_loss, 3, STEPS))
    for model in trained:
        assert model.never_used.weight.grad is None
        assert model.odd_branch.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_one_process(dtype: torch.dtype) -> None:
    trained = train_on_ranks(
        convolution().to(dtype), sgd, image_loss, 2, STEPS, bucket_cap_bytes=TINY_BUCKET_BYTES
    )
    assert_same_parameters(trained, train_alone(convolution().to(dtype), sgd, image_loss, 2, STEPS))


def test_channels_last_equals_one_process_and_keeps_its_strides() -> None:
    model = convolution().to(memory_format=torch.channels_last)
    trained = train_on_ranks(model, sgd, image_loss, 2, STEPS)
    assert_same_parameters(trained, train_alone(copy.deepcopy(model), sgd, image_loss, 2, STEPS))
    weight = trained[1][2].weight
    assert weight.grad.stride() == weight.stride() != weight.contiguous().stride()


def test_ranks_with_different_strides_still_pair_the_right_elements() -> None:
    def grad(group: _core.Group) -> Tensor:
        weight = nn.Parameter(
            torch.zeros(2, 3).t().contiguous().t() if group.rank else torch.zeros(2, 3)
        )
        optimizer = DistributedOptimizer(torch.optim.SGD([weight]), [("w", weight)], group=group)
        for _ in range(2):
            optimizer.zero_grad()
            (weight * torch.arange(6.0).view(2, 3)).sum().backward()
        return weight.grad

    for result in run_ranks(2, grad):
        assert torch.equal(result, torch.arange(6.0).view(2, 3))


def test_large_gradients_arrive_from_wherever_and_however_they_lie() -> None:
    """Long copies into buckets take a way of their own, and only if gradient and bucket agree."""
    shape = (300, 701)

    def inputs(rank: int) -> list[Tensor]:
        real = draw(*shape, seed=rank)
        return [
            draw(3, seed=10 + rank),  # what follows is no longer aligned to a cache line
            draw(*shape, seed=20 + rank),
            draw(*reversed(shape), seed=30 + rank).t(),
            draw(2 * shape[0], shape[1], seed=40 + rank)[::2],
            torch.complex(real, draw(*shape, seed=50 + rank)).conj(),
            torch._neg_view(draw(*shape, seed=60 + rank)),  # as the imaginary part of a conjugate
            draw(1, seed=70 + rank).expand(shape),
        ]

    def grads(group: _core.Group) -> list[Tensor]:
        params = [nn.Parameter(torch.zeros_like(grad)) for grad in inputs(group.rank)]
        named = [(str(i), param) for i, param in enumerate(params)]
        optimizer = DistributedOptimizer(torch.optim.SGD(params), named, group=group)
        for _ in range(2):  # the first pass lays out the buckets
            optimizer.zero_grad()
            for param, grad in zip(params, inputs(group.rank), strict=True):
                param.grad = grad
            optimizer.synchronize()
        return [param.grad for param in params]

    expected = [fold(list(of_ranks), 2) for of_ranks in zip(inputs(0), inputs(1), strict=True)]
    for results in run_ranks(2, grads):
        for i, (result, sum_of_ranks) in enumerate(zip(results, expected, strict=True)):
            assert torch.equal(result, sum_of_ranks), f"gradient {i}"


class ManyKinds(nn.Module):
    """One parameter of each kind that buckets must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.in_float64 = nn.Parameter(draw(3, dtype=torch.float64, seed=1))
        self.in_bfloat16 = nn.Parameter(draw(3, dtype=torch.bfloat16, seed=2))
        self.in_float16 = nn.Parameter(draw(3, dtype=torch.float16, seed=3))
        self.in_complex64 = nn.Parameter(torch.complex(draw(3, seed=4), draw(3, seed=5)))
        self.expanded = nn.Parameter(torch.ones(1, 3).expand(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        total = (self.scalar * x).sum() + self.empty.sum() + (self.expanded * x).sum()
        total = (
            total
            + (self.in_float64 * x).sum()
            + (self.in_bfloat16 * x).sum()
            + (self.in_float16 * x).sum()
        )
        return total + (self.in_complex64 * x).abs().sum()


def test_scalars_empty_complex_and_expanded_parameters_of_five_dtypes() -> None:
    def frozen_in_place(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.0)  # torch cannot step an expanded one

    def loss(model: nn.Module, step: int, rank: int) -> Tensor:
        return model(draw(3, seed=rank))

    trained = train_on_ranks(ManyKinds(), frozen_in_place, loss, 3, 3)
    by_rank = []
    for rank in range(3):
        alone = ManyKinds()
        loss(alone, 2, rank).backward()
        by_rank.append([param.grad for param in alone.parameters()])
    for model in trained:
        for (name, param), grads in zip(
            model.named_parameters(), zip(*by_rank, strict=True), strict=True
        ):
            assert torch.equal(param.grad, fold(grads, 3)), name


@pytest.mark.parametrize("hosts", [[0, 0, 1], [0, 1, 2]])
def test_training_over_several_hosts_equals_one_process(hosts: list[int]) -> None:
    """Placements whose canonical order is the ranks' own."""
    trained = train_on_ranks(
        convolution(), sgd, image_loss, 3, STEPS, hosts=hosts, bucket_cap_bytes=TINY_BUCKET_BYTES
    )
    assert_same_parameters(trained, train_alone(convolution(), sgd, image_loss, 3, STEPS))


def test_sum_does_not_divide() -> None:
    def grad(group: _core.Group) -> Tensor:
        weight = nn.Parameter(torch.ones(2))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight]), [("w", weight)], group=group, op=ReduceOp.SUM
        )
        for _ in range(3):
            optimizer.zero_grad()
            (weight * (group.rank + 1)).sum().backward()
            optimizer.step()
        return weight.grad

    for result in run_ranks(3, grad):
        assert result.tolist() == [6.0, 6.0]


def test_gradients_are_final_and_equal_when_backward_returns() -> None:
    replicas = [convolution() for _ in range(2)]

    def norms(group: _core.Group) -> list[float]:
        model = replicas[group.rank]
        optimizer = DistributedOptimizer(
            sgd(model), model.named_parameters(), group=group, bucket_cap_bytes=TINY_BUCKET_BYTES
        )
        seen = []
        for step in range(3):
            optimizer.zero_grad()
            image_loss(model, step, group.rank).backward()
            passes = optimizer._sync.passes
            optimizer.synchronize()
            assert optimizer._sync.passes == passes, "synchronize() found nothing to do"
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            clipped = [param.grad.clone() for param in model.parameters()]
            optimizer.step()
            assert all(map(torch.equal, clipped, [param.grad for param in model.parameters()]))
        assert optimizer.wait_seconds > 0
        return seen

    first, second = run_ranks(2, norms)
    assert first == second


# --- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_lbfgs_takes_the_same_steps_on_all_ranks_as_one_process(line_search_fn: str | None) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(model.parameters(), max_iter=5, line_search_fn=line_search_fn)

    def shard(model: nn.Module, rank: int) -> Tensor:
        return (model(draw(8, 3, seed=rank)) - draw(8, 2, seed=50 + rank)).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    replicas = [copy.deepcopy(model) for _ in range(2)]

    def train(group: _core.Group) -> tuple[nn.Module, list[float]]:
        replica = replicas[group.rank]
        optimizer = DistributedOptimizer(make(replica), replica.named_parameters(), group=group)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = shard(replica, group.rank)
            loss.backward()
            return loss

        return replica, [float(optimizer.step(closure)) for _ in range(STEPS)]

    def closure_alone() -> Tensor:
        losses, by_rank = [], []
        for rank in range(2):
            model.zero_grad()
            losses.append(shard(model, rank))
            losses[-1].backward()
            by_rank.append([param.grad for param in model.parameters()])
        for param, grads in zip(model.parameters(), zip(*by_rank, strict=True), strict=True):
            param.grad = fold(grads, 2)
        return (losses[0] + losses[1]).detach() / 2

    alone = make(model)
    losses = [float(alone.step(closure_alone)) for _ in range(STEPS)]
    results = run_ranks(2, train)
    assert_same_parameters([replica for replica, _ in results], model)
    assert [seen for _, seen in results] == [losses, losses]


def test_a_closure_may_return_a_float_or_nothing() -> None:
    def losses(group: _core.Group) -> list[float | None]:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight]), [("w", weight)], group=group)
        return [optimizer.step(lambda: float(group.rank)), optimizer.step(lambda: None)]

    assert run_ranks(2, losses) == [[0.5, None], [0.5, None]]


def test_a_closures_loss_must_be_one_number() -> None:
    def step(group: _core.Group) -> None:
        weight = nn.Parameter(torch.ones(1))
        optimizer = DistributedOptimizer(torch.optim.SGD([weight]), [("w", weight)], group=group)
        with pytest.raises(InvalidArgumentError, match=r"loss of shape \(2,\)"):
            optimizer.step(lambda: torch.zeros(2))

    run_ranks(2, step)


# --- an Optimizer to everybody --------------------------------------------------------------------


def test_schedulers_drive_the_wrapped_optimizer() -> None:
    replicas = [nn.Linear(3, 1) for _ in range(2)]

    def rates(group: _core.Group) -> list[float]:
        model = replicas[group.rank]
        inner = sgd(model)
        optimizer = DistributedOptimizer(inner, model.named_parameters(), group=group)
        assert isinstance(optimizer, torch.optim.Optimizer)
        schedulers = [
            torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
            torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=2),
        ]
        seen = []
        for step in range(4):
            optimizer.zero_grad()
            linear_loss(model, step, group.rank).backward()
            optimizer.step()
            schedulers[0].step()
            seen.append(inner.param_groups[0]["lr"])
        assert schedulers[1].get_last_lr() == [0.1]
        return seen

    assert run_ranks(2, rates) == [[0.1, 0.05, 0.05, 0.025]] * 2


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_grad_scaler_unscales_and_skips_on_all_ranks(fused: bool, set_to_none: bool) -> None:
    replicas = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    for replica in replicas:
        nn.init.ones_(replica.weight)

    def train(group: _core.Group) -> tuple[list[float], float, Tensor]:
        model = replicas[group.rank]
        optimizer = DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused),
            model.named_parameters(),
            group=group,
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        norms = []
        for step in range(4):
            # Not the optimizer's zero_grad: the wrapper must see by itself that a skipped step's
            # gradients are done with.
            model.zero_grad(set_to_none)
            loss = linear_loss(model, step, group.rank)
            if step == 1 and group.rank == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if step == 2:
                scaler.unscale_(optimizer)
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
            scaler.step(optimizer)
            scaler.update()
        return norms, scaler.get_scale(), model.weight

    (norms, scale, weight), other = run_ranks(2, train)
    assert scale == 8.0, "one skipped step halves the scale once"
    assert other[:2] == (norms, scale)
    assert torch.equal(weight, other[2])

    alone = nn.Linear(3, 2, bias=False)
    nn.init.ones_(alone.weight)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.1, fused=fused)
    for step in (0, 2, 3):
        grads = []
        for rank in range(2):
            alone.zero_grad()
            linear_loss(alone, step, rank).backward()
            grads.append(alone.weight.grad)
        alone.weight.grad = fold(grads, 2)
        optimizer.step()
    assert torch.equal(weight, alone.weight), "powers of two scale without rounding"


def test_state_dict_loads_into_the_bare_optimizer_and_back() -> None:
    trained = []

    def train(group: _core.Group) -> None:
        with lock:
            model = convolution()
        optimizer = DistributedOptimizer(adamw(model), model.named_parameters(), group=group)
        image_loss(model, 0, group.rank).backward()
        optimizer.step()
        bare = adamw(model)
        bare.load_state_dict(optimizer.state_dict())
        assert bare.state_dict()["state"][0]["step"] == 1
        optimizer.load_state_dict(bare.state_dict())
        assert optimizer.state is optimizer._inner.state
        assert optimizer.param_groups is optimizer._inner.param_groups
        trained.append((model, optimizer))

    lock = threading.Lock()
    run_ranks(2, train)
    torch.save(trained[0][1].state_dict(), io.BytesIO())
    torch.save(trained[0][0], io.BytesIO())  # hooks do not hinder saving or copying the model
    assert copy.deepcopy(trained[0][0])[0].weight._post_accumulate_grad_hooks is None


def test_hooks_and_attributes_are_the_wrapped_optimizers() -> None:
    model = nn.Linear(2, 1)
    inner = sgd(model)
    optimizer = run_ranks(1, lambda group: DistributedOptimizer(inner, group=group))[0]
    calls = []
    optimizer.register_step_pre_hook(lambda opt, *_: calls.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, *_: calls.append(("post", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, _: calls.append(("state", opt)))
    optimizer.step()
    optimizer.state_dict()
    assert calls == [("pre", inner), ("post", inner), ("state", inner)]
    inner.own_attribute = 5
    assert optimizer.own_attribute == 5
    with pytest.raises(AttributeError, match="no_such"):
        _ = optimizer.no_such
    assert "SGD" in repr(optimizer)
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_param_groups_keep_their_rates_and_can_be_added_later() -> None:
    first, second, spare = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2)
    replicas = [nn.ModuleList(copy.deepcopy(m) for m in (first, second, spare)) for _ in range(2)]

    def make(model: nn.ModuleList) -> torch.optim.Optimizer:
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
        return torch.optim.SGD(groups, lr=0.01)

    def loss(model: nn.ModuleList, step: int, rank: int) -> Tensor:
        hidden = model[1](model[0](draw(4, 3, seed=10 * step + rank)))
        return (model[2](hidden) if step >= 2 else hidden).square().mean()

    def train(group: _core.Group) -> nn.Module:
        model = replicas[group.rank]
        optimizer = DistributedOptimizer(make(model), model.named_parameters(), group=group)
        for step in range(STEPS):
            if step == 2:
                optimizer.add_param_group({"params": model[2].parameters(), "lr": 1.0})
            optimizer.zero_grad()
            loss(model, step, group.rank).backward()
            optimizer.step()
        assert optimizer._sync.names[-1] == "2.bias"
        return model

    alone = nn.ModuleList([first, second, spare])
    optimizer = make(alone)
    for step in range(STEPS):
        if step == 2:
            optimizer.add_param_group({"params": alone[2].parameters(), "lr": 1.0})
        by_rank = []
        for rank in range(2):
            alone.zero_grad()
            loss(alone, step, rank).backward()
            by_rank.append([param.grad for param in alone.parameters()])
        for param, grads in zip(alone.parameters(), zip(*by_rank, strict=True), strict=True):
            param.grad = fold(grads, 2)
        optimizer.step()
    assert_same_parameters(run_ranks(2, train), alone)


def test_a_refused_param_group_is_not_added() -> None:
    def add(group: _core.Group) -> int:
        model, spare = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = DistributedOptimizer(sgd(model), model.named_parameters(), group=group)
        if group.rank == 1:
            spare.to(torch.float64)
        with pytest.raises(
            MismatchError, match=r"add_param_group: .*first:\n.*float32.*\n.*float64"
        ):
            optimizer.add_param_group({"params": spare.parameters()})
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return len(optimizer.param_groups)

    assert run_ranks(2, add) == [1, 1]


# --- several optimizers, and their end ------------------------------------------------------------


def test_two_wrapped_optimizers_do_not_disturb_each_other() -> None:
    """As a GAN trains: each loss reaches both models, each optimizer steps its own."""
    torch.manual_seed(0)
    pair = nn.ModuleDict({"generator": nn.Linear(3, 3), "critic": nn.Linear(3, 1)})
    replicas = [copy.deepcopy(pair) for _ in range(2)]

    def losses(models: nn.ModuleDict, step: int, rank: int) -> tuple[Tensor, Tensor]:
        fake = models["generator"](draw(4, 3, seed=10 * step + rank))
        real = draw(4, 3, seed=1000 + 10 * step + rank)
        critic = models["critic"]
        return (critic(real) - critic(fake.detach())).mean(), critic(fake).square().mean()

    def train(group: _core.Group) -> nn.Module:
        models = replicas[group.rank]
        optimizers = {
            name: DistributedOptimizer(sgd(model), model.named_parameters(), group=group)
            for name, model in models.items()
        }
        for step in range(STEPS):
            for index, name in enumerate(("critic", "generator")):
                optimizers["critic"].zero_grad()
                optimizers["generator"].zero_grad()
                losses(models, step, group.rank)[index].backward()
                optimizers[name].step()
        return models

    optimizers = {name: sgd(model) for name, model in pair.items()}
    for step in range(STEPS):
        for index, name in enumerate(("critic", "generator")):
            by_rank = []
            for rank in range(2):
                pair.zero_grad()
                losses(pair, step, rank)[index].backward()
                by_rank.append([param.grad for param in pair.parameters()])
            for param, grads in zip(pair.parameters(), zip(*by_rank, strict=True), strict=True):
                param.grad = fold(grads, 2)
            optimizers[name].step()
    assert_same_parameters(run_ranks(2, train), pair)


def test_a_dropped_optimizer_leaves_its_parameters_to_the_next() -> None:
    def grads(group: _core.Group) -> Tensor:
        weight = nn.Parameter(torch.ones(2))
        first = DistributedOptimizer(torch.optim.SGD([weight]), group=group)
        with pytest.raises(InvalidArgumentError, match="belongs to another wrapped optimizer"):
            DistributedOptimizer(torch.optim.SGD([weight]), group=group)
        del first
        assert not weight._post_accumulate_grad_hooks
        second = DistributedOptimizer(torch.optim.SGD([weight]), group=group)
        (weight * group.rank).sum().backward()
        del second
        return weight.grad  # its memory outlives optimizer and bucket

    for grad in run_ranks(2, grads):
        assert grad.tolist() == [0.5, 0.5]


# --- refused --------------------------------------------------------------------------------------


def refused_on_all(world_size: int, make) -> list[str]:
    """The errors with which every rank refuses make(group)."""

    def attempt(group: _core.Group) -> str:
        with pytest.raises((InvalidArgumentError, MismatchError)) as caught:
            make(group)
        return str(caught.value)

    return run_ranks(world_size, attempt)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        (lambda rank: nn.Linear(3, 2 + rank), r"rank 0: .*'weight': \(2, 3\).*\n.*\(3, 3\)"),
        (lambda rank: nn.Linear(3, 2, bias=not rank), r"rank 1: no more than 1 parameters"),
        (lambda rank: nn.Linear(3, 2).to([torch.float32, torch.float64][rank]), "float64"),
        (
            lambda rank: nn.Linear(3, 2).requires_grad_(True) if not rank else half_frozen(),
            "frozen",
        ),
    ],
)
def test_ranks_with_different_parameters_all_refuse(difference, message: str) -> None:
    def make(group: _core.Group) -> None:
        model = difference(group.rank)
        DistributedOptimizer(sgd(model), model.named_parameters(), group=group)

    for error in refused_on_all(2, make):
        assert re.search(message, error), error


def half_frozen() -> nn.Module:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    return model


def test_ranks_with_different_arguments_all_refuse() -> None:
    def make(group: _core.Group) -> None:
        model = nn.Linear(3, 2)
        DistributedOptimizer(sgd(model), group=group, backward_passes_per_step=1 + group.rank)

    for error in refused_on_all(2, make):
        assert "backward_passes_per_step=1" in error and "backward_passes_per_step=2" in error


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda group, m: DistributedOptimizer(sgd(m), [("w", m.weight)], group=group),
            r"parameter 1 of param_groups\[0\], of shape \(2,\), is missing in named_parameters",
        ),
        (
            lambda group, m: DistributedOptimizer(
                sgd(m), [("w", m.weight), ("w", m.bias)], group=group
            ),
            r"two parameters are named 'w', of shapes \(2, 3\) and \(2,\)",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m), m.parameters(), group=group),
            r"holds a Parameter, not \(name, parameter\)",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m.requires_grad_(False)), group=group),
            "no trainable parameter",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m.to("meta")), group=group),
            "is a torch.strided tensor on meta",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m), group=group, op=ReduceOp.MAX),
            "op is .*MAX.*AVG or SUM",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m), group=group, bucket_cap_bytes=0),
            "bucket_cap_bytes is 0",
        ),
        (
            lambda group, m: DistributedOptimizer(sgd(m.to(torch.float8_e4m3fn)), group=group),
            "is torch.float8_e4m3fn, and gradients are reduced as float16, bfloat16",
        ),
    ],
)
def test_bad_parameters_are_refused_by_name(world_size: int, make, message: str) -> None:
    for error in refused_on_all(world_size, lambda group: make(group, nn.Linear(3, 2))):
        assert re.search(message, error), error


def test_one_ranks_mistake_is_everybodys_error() -> None:
    def make(group: _core.Group) -> None:
        model = nn.Linear(3, 2)
        named = [("w", model.weight)] if group.rank == 1 else model.named_parameters()
        DistributedOptimizer(sgd(model), named, group=group)

    for error in refused_on_all(3, make):
        assert "rank 1" in error and "missing in named_parameters" in error


def test_only_an_optimizer_can_be_wrapped() -> None:
    with pytest.raises(TypeError, match="not a Linear"):
        run_with_cause(lambda group: DistributedOptimizer(nn.Linear(1, 1), group=group))


def run_with_cause(fn) -> None:
    try:
        run_ranks(1, fn)
    except RankError as error:
        raise error.__cause__ from None


# --- a world of one -------------------------------------------------------------------------------


def test_a_world_of_one_hooks_nothing_and_trains_like_the_bare_optimizer() -> None:
    def train(group: _core.Group) -> nn.Module:
        model = convolution()
        optimizer = DistributedOptimizer(adamw(model), model.named_parameters(), group=group)
        assert model[0].weight._post_accumulate_grad_hooks is None
        for step in range(STEPS):
            optimizer.zero_grad()
            with optimizer.no_sync():
                image_loss(model, step, 0).backward()
            optimizer.synchronize()
            optimizer.step()
        assert optimizer.wait_seconds == 0.0
        return model

    assert_same_parameters(
        run_ranks(1, train), train_alone(convolution(), adamw, image_loss, 1, STEPS)
    )


def test_gradients_on_their_way_into_buckets_cost_no_page_faults() -> None:
    """Each was freed after the copy, glibc shrank the heap, and every step faulted it in again."""
    done = mpirun(
        2,
        """
        import resource
        import torch, pycomm
        from pycomm.bench.ranks.step import TOKENS, WIDTH, transformer

        torch.set_num_threads(1)
        pycomm.init()
        model = transformer()
        optimizer = pycomm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4))
        batch = torch.randn(1, TOKENS, WIDTH)
        for step in range(7):
            if step == 4:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3
        assert faults < 500, f"{faults} page faults a step"
        pycomm.shutdown()
        """,
    )
    assert done.returncode == 0, done.err
