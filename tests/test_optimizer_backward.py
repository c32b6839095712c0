"""Backward passes of every kind: accumulated, repeated, nested, abandoned, partial, sparse."""

import contextlib
import functools
import gc
import re
import threading

import pytest
import torch
from parity import assert_same_parameters, fold, train_alone, train_on_ranks
from run_ranks import run_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pycomm import _core
from pycomm._core import ReduceOp
from pycomm.errors import CommError, InvalidArgumentError, MismatchError, PeerLostError
from pycomm.optimizer import DistributedOptimizer

STEPS = 5


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def layers(count: int = 3) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def inputs(step: int, rank: int) -> Tensor:
    return draw(3, 4, seed=100 * step + rank).requires_grad_()


class Scalars:
    """Parameters a and b on one rank; the gradient of ``2 * a`` is 2."""

    def __init__(self, group: _core.Group, *, lr: float = 0.0, **options: object) -> None:
        self.rank = group.rank
        self.a = nn.Parameter(torch.ones(1))
        self.b = nn.Parameter(torch.ones(1))
        self.named = [("a", self.a), ("b", self.b)]
        self.optimizer = DistributedOptimizer(
            torch.optim.SGD([self.a, self.b], lr=lr), self.named, group=group, **options
        )

    def train_once(self) -> None:
        """A whole step, so that what follows overlaps with backward."""
        self.optimizer.zero_grad()
        (self.a + self.b).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def grads(self) -> list[float | None]:
        return [None if p.grad is None else p.grad.item() for p in (self.a, self.b)]


def on_ranks(world_size: int, body, **options: object) -> list:
    """body(scalars) on every rank, once with buckets being laid out and once with overlap."""
    results = []
    for trained in (False, True):

        def run(group: _core.Group, trained: bool = trained) -> object:
            scalars = Scalars(group, **options)
            if trained:
                scalars.train_once()
            return body(scalars)

        results.append(run_ranks(world_size, run))
    assert results[0] == results[1]
    return results[0]


# --- accumulation ---------------------------------------------------------------------------------


def micro_loss(model: nn.Module, step: int, rank: int, micro: int) -> Tensor:
    return loss_of(model(draw(3, 4, seed=1000 * step + 10 * rank + micro)))


def accumulated_alone(world_size: int, micros: int, divisor: int) -> nn.Module:
    model = layers()
    optimizer = sgd(model)
    for step in range(STEPS):
        by_rank = []
        for rank in range(world_size):
            model.zero_grad()
            for micro in range(micros):
                micro_loss(model, step, rank, micro).backward()
            by_rank.append([param.grad for param in model.parameters()])
        for param, grads in zip(model.parameters(), zip(*by_rank, strict=True), strict=True):
            param.grad = fold(grads, divisor)
        optimizer.step()
    return model


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("how", ["no_sync", "passes", "averaged", "step reduces"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_accumulation_equals_one_process(world_size: int, how: str, set_to_none: bool) -> None:
    micros = 3
    options: dict[str, object] = {}
    if how in ("passes", "averaged"):
        options = {"backward_passes_per_step": micros, "average_accumulated": how == "averaged"}
    replicas = [layers() for _ in range(world_size)]

    def train(group: _core.Group) -> nn.Module:
        model = replicas[group.rank]
        optimizer = DistributedOptimizer(
            sgd(model), model.named_parameters(), group=group, bucket_cap_bytes=64, **options
        )
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none)
            for micro in range(micros):
                silent = how == "step reduces" or (how == "no_sync" and micro < micros - 1)
                loss = micro_loss(model, step, group.rank, micro)
                if silent:
                    with optimizer.no_sync():
                        loss.backward()
                else:
                    loss.backward()
            optimizer.step()
        return model

    divisor = world_size * micros if how == "averaged" else world_size
    assert_same_parameters(
        run_ranks(world_size, train), accumulated_alone(world_size, micros, divisor)
    )


def test_a_gradient_pending_from_no_sync_is_reduced_though_the_last_pass_does_not_touch_it() -> (
    None
):
    def body(s: Scalars) -> list[float | None]:
        with s.optimizer.no_sync():
            (2 * s.a * (s.rank + 1)).backward()
        (10 * s.b).backward()
        return s.grads()

    assert on_ranks(2, body) == [[3.0, 10.0]] * 2


def test_zero_grad_forgets_what_was_accumulated() -> None:
    def body(s: Scalars) -> list[float | None]:
        with s.optimizer.no_sync():
            (2 * s.a).backward()
        s.optimizer.zero_grad()
        (10 * s.b).backward()
        return s.grads()

    assert on_ranks(2, body) == [[None, 10.0]] * 2


def test_an_incomplete_accumulation_is_reduced_by_step() -> None:
    def body(s: Scalars) -> list[float | None]:
        for _ in range(2):
            (2 * s.a * (s.rank + 1)).backward()
        assert s.grads() == [4.0 * (s.rank + 1), None], "no communication so far"
        s.optimizer.step()
        return s.grads()

    results = run_ranks(2, lambda group: body(Scalars(group, backward_passes_per_step=3)))
    assert results == [[6.0, None]] * 2


def test_synchronize_reduces_what_was_accumulated_so_that_it_can_be_clipped() -> None:
    def body(s: Scalars) -> list[float | None]:
        with s.optimizer.no_sync():
            (2 * s.a * (s.rank + 1)).backward()
        s.optimizer.synchronize()
        s.a.grad.mul_(0.5)
        s.optimizer.step()
        return s.grads()

    assert on_ranks(2, body) == [[1.5, None]] * 2


def test_accumulated_sums_can_be_averaged_over_passes_only() -> None:
    def body(group: _core.Group) -> list[float | None]:
        s = Scalars(group, op=ReduceOp.SUM, backward_passes_per_step=4, average_accumulated=True)
        for _ in range(4):
            (2 * s.a).backward()
        return s.grads()

    assert run_ranks(2, body) == [[4.0, None]] * 2
    assert run_ranks(1, body) == [[2.0, None]]


# --- a second pass --------------------------------------------------------------------------------

SECOND_PASS = r"gradient of 'a' on rank \d is final.*second backward.*\n.*zero_grad.*no_sync"


@pytest.mark.parametrize("silently", [False, True])
def test_a_second_backward_is_refused_and_the_optimizer_goes_on_after_zero_grad(
    silently: bool,
) -> None:
    def body(s: Scalars) -> list[float | None]:
        (2 * s.a).backward()
        where = s.optimizer.no_sync() if silently else contextlib.nullcontext()
        with where, pytest.raises(InvalidArgumentError, match=SECOND_PASS):
            (2 * s.a).backward()
        s.optimizer.zero_grad()
        (3 * s.a * s.rank).backward()
        s.optimizer.step()
        return s.grads()

    assert on_ranks(2, body) == [[1.5, None]] * 2


@pytest.mark.parametrize("forget", ["optimizer", "none", "zero"])
def test_every_way_to_zero_gradients_allows_the_next_backward(forget: str) -> None:
    def body(s: Scalars) -> list[float | None]:
        for _ in range(3):
            (2 * s.a * (s.rank + 1)).backward()
            if forget == "optimizer":
                s.optimizer.zero_grad(set_to_none=False)
                continue
            s.optimizer.step()  # only the optimizer's own zero_grad can do without
            for param in (s.a, s.b):
                if forget == "none":
                    param.grad = None
                elif param.grad is not None:
                    param.grad.zero_()
        (2 * s.a * (s.rank + 1)).backward()
        return s.grads()

    assert on_ranks(2, body)[0][0] == 3.0


def test_without_zero_grad_an_average_keeps_accumulating_over_steps() -> None:
    def body(s: Scalars) -> list[float | None]:
        for _ in range(3):
            (2 * s.a * (s.rank + 1)).backward()
            s.optimizer.step()
        return s.grads()

    assert on_ranks(2, body) == [[9.0, None]] * 2


def test_without_zero_grad_a_sum_is_refused() -> None:
    def body(s: Scalars) -> None:
        (2 * s.a).backward()
        s.optimizer.step()
        with pytest.raises(InvalidArgumentError, match=r"'a' .* would count once for each rank"):
            (2 * s.a).backward()

    on_ranks(2, body, op=ReduceOp.SUM)


def test_two_losses_over_different_parameters_may_run_one_after_the_other() -> None:
    def body(s: Scalars) -> list[float | None]:
        (2 * s.a * (s.rank + 1)).backward()
        final = s.a.grad.clone()
        (10 * s.b * (s.rank + 1)).backward()
        assert torch.equal(s.a.grad, final)
        s.optimizer.step()
        return s.grads()

    assert on_ranks(2, body) == [[3.0, 15.0]] * 2


def test_retain_graph_allows_another_pass_over_the_same_graph() -> None:
    def body(s: Scalars) -> list[float | None]:
        loss = (2 * s.a * (s.rank + 1)).exp().log()
        with s.optimizer.no_sync():
            loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        first = s.grads()
        s.optimizer.zero_grad()
        loss.backward()
        return [*first, *s.grads()]

    for result in on_ranks(2, body):
        assert result == [pytest.approx(6.0), None, pytest.approx(3.0), None]


def test_create_graph_is_refused() -> None:
    def body(s: Scalars) -> None:
        with pytest.raises(
            InvalidArgumentError, match=r"'a' .*create_graph=True.*\n.*autograd.grad"
        ):
            (s.a**2).backward(create_graph=True)
        s.a.grad = None  # breaks the cycle that create_graph makes

    with pytest.warns(UserWarning, match="create_graph=True"):
        on_ranks(2, body)
    gc.collect()


# --- who uses what --------------------------------------------------------------------------------


def test_unused_on_some_counts_as_zero_and_unused_on_all_keeps_its_gradient() -> None:
    def body(s: Scalars) -> list[list[float | None]]:
        seen = []
        for user in (0, 1, None):
            s.optimizer.zero_grad()
            (s.b + (3 * s.a if s.rank == user else 0)).backward()
            seen.append(s.grads())
            s.optimizer.step()
        return seen

    assert on_ranks(3, body) == [[[1.0, 1.0], [1.0, 1.0], [None, 1.0]]] * 3


def test_a_rank_that_runs_no_backward_contributes_zero_at_step() -> None:
    def body(s: Scalars) -> list[float | None]:
        if s.rank == 1:
            (2 * s.a).backward()
        s.optimizer.step()
        grads = s.grads()
        s.train_once()
        return grads

    assert on_ranks(2, body) == [[1.0, None]] * 2


def test_a_kept_gradient_of_an_unused_parameter_stays_bit_for_bit() -> None:
    """A third is not exact: (x + x + x) / 3 must not replace x."""

    def body(s: Scalars) -> bool:
        (s.a / 3 * (s.rank + 1)).backward()
        s.optimizer.step()
        kept = s.a.grad.clone()
        for _ in range(2):
            s.b.grad = None
            s.b.backward()
            s.optimizer.step()
        return torch.equal(s.a.grad, kept)

    assert on_ranks(3, body) == [True] * 3


def test_parameters_can_be_frozen_and_unfrozen_together() -> None:
    def train(group: _core.Group) -> list[list[float | None]]:
        s = Scalars.__new__(Scalars)
        s.a, s.b = (nn.Parameter(torch.ones(1)) for _ in range(2))
        s.a.requires_grad_(False)
        s.optimizer = DistributedOptimizer(
            torch.optim.SGD([s.a, s.b], lr=0.0), [("a", s.a), ("b", s.b)], group=group
        )
        seen = []
        for step in range(8):
            # b alone, then a alone, then both
            s.a.requires_grad_(step >= 2)
            s.b.requires_grad_(not 2 <= step < 5)
            s.optimizer.zero_grad()
            ((s.a + s.b) * (group.rank + 1)).backward()
            seen.append(s.grads())
            s.optimizer.step()
        return seen

    expected = [[None, 1.5]] * 2 + [[1.5, None]] * 3 + [[1.5, 1.5]] * 3
    assert run_ranks(2, train) == [expected] * 2


def test_unfreezing_on_one_rank_only_is_everybodys_error() -> None:
    def train(group: _core.Group) -> str:
        s = Scalars(group)
        s.a.requires_grad_(group.rank == 0)
        with pytest.raises(MismatchError) as caught:
            (s.a + s.b).backward()
        return str(caught.value)

    for error in run_ranks(2, train):
        assert "'a' requires a gradient on rank 0 and is frozen on rank 1" in error


def test_a_backward_pass_more_on_one_rank_is_everybodys_error() -> None:
    """Without the pass's number in the signature, ranks would exchange gradients of two steps."""

    def train(group: _core.Group) -> str:
        s = Scalars(group)
        s.train_once()

        def uneven_step() -> None:
            s.a.backward()
            if group.rank == 0:
                s.b.backward()
            s.optimizer.step()
            s.optimizer.zero_grad()
            s.a.backward()

        with pytest.raises(CommError) as caught:
            uneven_step()
        return str(caught.value)

    for error in run_ranks(2, train):
        assert "backward 2 of its step" in error and "backward 1 of its step" in error, error


# --- graphs within graphs -------------------------------------------------------------------------

# Ranks are threads here and share torch's random generator: saving its state, each waits with the
# GIL for the other's lock now and then, or with the lock for the GIL.
rerun = functools.partial(checkpoint, use_reentrant=True, preserve_rng_state=False)


def whole(model: nn.Sequential, x: Tensor) -> Tensor:
    return rerun(model, x)


def middle(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[2](rerun(model[1], model[0](x)))


def nested(model: nn.Sequential, x: Tensor) -> Tensor:
    return rerun(lambda y: model[2](rerun(lambda z: model[1](rerun(model[0], z)), y)), x)


def shared_by_two(model: nn.Sequential, x: Tensor) -> Tensor:
    """model[0]'s hooks fire twice; between them model[1]'s bucket is full."""
    return rerun(model[0], model[1](rerun(model[0], model[2](x))))


def shared_in_and_out(model: nn.Sequential, x: Tensor) -> Tensor:
    return model[0](rerun(model[1], rerun(model[0], x)))


def not_reentrant(model: nn.Sequential, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "forward", [whole, middle, nested, shared_by_two, shared_in_and_out, not_reentrant]
)
def test_checkpointing_equals_one_process(forward, overlap: bool) -> None:
    def loss(model: nn.Sequential, step: int, rank: int) -> Tensor:
        return loss_of(forward(model, inputs(step, rank)))

    trained = train_on_ranks(layers(), sgd, loss, 2, STEPS, bucket_cap_bytes=1, overlap=overlap)
    assert_same_parameters(trained, train_alone(layers(), sgd, loss, 2, STEPS))


def pieces(s: Scalars, count: int) -> Tensor:
    """A loss whose gradient for `a` arrives in `count` pieces, after that for `b`."""
    x = torch.ones(1, requires_grad=True)
    for _ in range(count):
        x = rerun(lambda y: y * s.a, x)
    return x * s.b


def test_more_pieces_than_the_first_pass_saw_are_an_error_with_a_remedy() -> None:
    passed_once = threading.Barrier(2)  # else the error may reach a rank in its first pass

    def train(group: _core.Group) -> str:
        s = Scalars(group, bucket_cap_bytes=1)
        pieces(s, 1).backward()
        s.optimizer.step()
        s.optimizer.zero_grad()
        passed_once.wait(timeout=60)
        with pytest.raises(CommError) as caught:
            pieces(s, 2).backward()
        return str(caught.value)

    errors = run_ranks(2, train)
    assert any(
        re.search(r"'a' became final 2 times .* expected 1 times.*overlap=False", error)
        for error in errors
    ), errors


def test_without_overlap_gradients_may_arrive_in_any_number_of_pieces() -> None:
    def train(group: _core.Group) -> list[list[float | None]]:
        s = Scalars(group, bucket_cap_bytes=1, overlap=False)
        seen = []
        for count in (1, 3, 2):
            s.optimizer.zero_grad()
            pieces(s, count).backward()
            seen.append(s.grads())
            s.optimizer.step()
        return seen

    assert run_ranks(2, train) == [[[1.0, 1.0], [3.0, 1.0], [2.0, 1.0]]] * 2


# --- sparse gradients -----------------------------------------------------------------------------


def test_sparse_gradients_are_reduced_dense_on_request() -> None:
    def make() -> nn.Embedding:
        return nn.Embedding.from_pretrained(draw(5, 2, seed=0), freeze=False, sparse=True)

    def train(group: _core.Group, accumulate: bool) -> Tensor:
        model = make()
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.named_parameters(),
            group=group,
            sparse_as_dense=True,
        )
        for _ in range(3):
            optimizer.zero_grad()
            if accumulate:
                with optimizer.no_sync():
                    model(torch.tensor([0])).sum().backward()
            model(torch.tensor([group.rank, 4])).sum().backward()
            optimizer.step()
        return model.weight.grad

    for grad in run_ranks(2, lambda group: train(group, False)):
        assert grad[:, 0].tolist() == [0.5, 0.5, 0.0, 0.0, 1.0]
    for grad in run_ranks(2, lambda group: train(group, True)):
        assert grad[:, 0].tolist() == [1.5, 0.5, 0.0, 0.0, 1.0]


def test_sparse_gradients_are_refused_by_name_otherwise() -> None:
    def train(group: _core.Group) -> None:
        model = nn.Embedding(5, 2, sparse=True)
        optimizer = DistributedOptimizer(
            torch.optim.SGD(model.parameters()), model.named_parameters(), group=group
        )
        with pytest.raises(
            InvalidArgumentError, match=r"'weight' .*sparse.*\n.*sparse_as_dense=True"
        ):
            model(torch.tensor([0])).sum().backward()
        assert optimizer is not None

    run_ranks(2, train)


# --- what is left behind --------------------------------------------------------------------------


class Raises(torch.autograd.Function):
    """Passes on its input; its backward raises."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


def test_an_abandoned_backward_is_forgotten_if_nothing_was_launched() -> None:
    def body(s: Scalars) -> list[float | None]:
        with pytest.raises(ZeroDivisionError):
            # b's hook fires, a's never; on top of both lies nothing that fires later.
            (s.b + Raises.apply(s.a * 1.0) * 1.0).backward()
        s.optimizer.zero_grad()
        (2 * s.a * (s.rank + 1) + s.b).backward()
        s.optimizer.step()
        return s.grads()

    assert on_ranks(2, body) == [[3.0, 1.0]] * 2


def test_a_backward_abandoned_in_flight_ends_the_group_and_says_so() -> None:
    def train(group: _core.Group) -> None:
        s = Scalars(group, bucket_cap_bytes=1)
        for fails in (False, True):
            # The engine runs what was recorded last first: b's bucket is launched, then a raises.
            first = Raises.apply(s.a * 1.0) if fails else s.a * 1.0
            if fails:
                with pytest.raises(ZeroDivisionError):
                    (first + s.b * 1.0).backward()
            else:
                (first + s.b * 1.0).backward()
                s.optimizer.step()
            s.optimizer.zero_grad()
            group.barrier()  # else the error may reach a rank in the pass before
        with pytest.raises((CommError, PeerLostError), match="ended by an exception after 1 of 2"):
            (s.a + s.b).backward()

    run_ranks(2, train)


def test_an_optimizer_dropped_in_flight_leaves_no_operation_behind() -> None:
    def train(group: _core.Group) -> list[float | None]:
        s = Scalars(group, bucket_cap_bytes=1)
        (s.a * 1.0 + s.b * 1.0).backward()
        s.optimizer.step()
        s.optimizer.zero_grad()
        group.barrier()  # the drop ends whatever the other rank is still waiting for
        if group.rank == 0:  # alone, so that b's bucket is surely in flight
            with pytest.raises(ZeroDivisionError):
                (Raises.apply(s.a * 1.0) + s.b * 1.0).backward()
        del s.optimizer
        gc.collect()
        s.a.grad = s.b.grad = None
        again = DistributedOptimizer(torch.optim.SGD([s.a, s.b]), s.named, group=group)
        (s.a * (group.rank + 1) + s.b).backward()
        assert again is not None
        return s.grads()

    assert run_ranks(2, train) == [[1.5, 1.0]] * 2


def test_after_a_failure_gradients_lie_in_private_memory() -> None:
    def train(group: _core.Group) -> bool:
        s = Scalars(group)
        s.train_once()
        views = [slot.view for slot in s.optimizer._sync._slots]
        group.barrier()  # else rank 0 may hear of the end in the first pass
        if group.rank == 0:
            with pytest.raises(CommError):
                (s.a + s.b).backward()
        else:
            s.optimizer._sync.group.abort("rank 1 gives up")
        return any(param.grad is view for (_, param), view in zip(s.named, views, strict=True))

    assert run_ranks(2, train) == [False, False]


# --- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_buckets_follow_the_order_of_arrival_and_start_before_backward_ends(overlap: bool) -> None:
    replicas = [layers() for _ in range(2)]

    def train(group: _core.Group) -> tuple[list[list[str]], list[int]]:
        model = replicas[group.rank]
        optimizer = DistributedOptimizer(
            sgd(model),
            model.named_parameters(),
            group=group,
            bucket_cap_bytes=80,
            overlap=overlap,
        )
        sync = optimizer._sync
        launched = []

        def last_hook_but_one(_: Tensor) -> None:
            if sync._reducer is not None:
                launched.append(sync._reducer.launched)

        model[0].bias.register_post_accumulate_grad_hook(last_hook_but_one)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model(inputs(step, group.rank))).backward()
            optimizer.step()
        names = [slot.name for slot in sync._planned]
        return [[names[i] for i in bucket.parameters] for bucket in sync._reducer.buckets], launched

    # Arrival order: each layer's bias, then its weight, from the last layer to the first.
    plan = [[f"{i}.bias", f"{i}.weight"] for i in (2, 1, 0)]
    assert run_ranks(2, train) == [(plan, [2, 2] if overlap else [0, 0])] * 2


@pytest.mark.parametrize("planned", [False, True])
def test_gradients_that_no_hook_has_seen_are_reduced_by_step(planned: bool) -> None:
    def body(group: _core.Group) -> None:
        weight = nn.Parameter(torch.ones(3))
        other = nn.Parameter(torch.ones(2))  # nobody ever uses it
        if not planned:
            weight.grad = torch.full((3,), 2.0 * group.rank)  # from before it was wrapped
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight, other], lr=1.0), [("w", weight), ("o", other)], group=group
        )
        if planned:
            (weight * group.rank).sum().backward()
            optimizer.step()
            with torch.no_grad():
                weight.fill_(1.0)
            optimizer.zero_grad()
            (weight.grad,) = torch.autograd.grad((weight * 2 * group.rank).sum(), [weight])
        optimizer.step()
        assert weight.tolist() == [0.0] * 3  # 1 - (0 + 2) / 2
        assert other.grad is None

    run_ranks(2, body)
