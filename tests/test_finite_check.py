"""NaN and infinity in gradients: found on every rank alike, and named by parameter and rank."""

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import bits, fold
from run_ranks import RankError, run_ranks
from torch import Tensor, nn

import pycomm
from pycomm import compression
from pycomm._core import Group, ReduceOp
from pycomm.errors import (
    InvalidArgumentError,
    MismatchError,
    NonFiniteError,
    NonFiniteGradient,
)
from pycomm.join import join
from pycomm.optimizer import DistributedOptimizer
from pycomm.runtime import world_group

NAN, INF = math.nan, math.inf
HOSTS = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 1]]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Shorter than a cache line, longer, and longer than what is copied past the caches.
SIZES = {"a": (3,), "b": (), "c": (5, 7), "d": (0,), "e": (150, 151)}
Gradients = dict[str, Tensor]


class Given:
    """Parameters whose gradients a test chooses, on one rank."""

    def __init__(
        self,
        group: Group,
        *,
        sizes: dict[str, tuple[int, ...]] = SIZES,
        dtype: torch.dtype = torch.float32,
        momentum: float = 0.5,
        **options: object,
    ) -> None:
        self.rank = group.rank
        self.params = {name: nn.Parameter(torch.ones(n, dtype=dtype)) for name, n in sizes.items()}
        bare = torch.optim.SGD(self.params.values(), lr=0.25, momentum=momentum)
        options = {"check_finite": "error", "bucket_cap_bytes": 256} | options
        self.optimizer = DistributedOptimizer(bare, self.params.items(), group=group, **options)

    def ones(self) -> Gradients:
        return {name: torch.ones_like(param) for name, param in self.params.items()}

    def spoiled(self, places: dict[str, float]) -> Gradients:
        """Ones, but for the last element of some."""
        gradients = self.ones()
        for name, value in places.items():
            gradients[name].detach().reshape(-1)[-1] = value
        return gradients

    def backward(self, gradients: Gradients) -> None:
        """The parameters that are not named are not used."""
        sum((self.params[name] * grad).sum() for name, grad in gradients.items()).backward()

    def values(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params.values()]


def found(error: pytest.ExceptionInfo[NonFiniteError]) -> dict[str, tuple[int, ...]]:
    return {gradient.name: gradient.ranks for gradient in error.value.gradients}


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


# --- error ----------------------------------------------------------------------------------------


def check_that_they_are_named(group: Group, dtype: torch.dtype, overlap: bool) -> None:
    last = group.size - 1
    given_ = Given(group, dtype=dtype, overlap=overlap)
    for _ in range(3):  # the recording pass, and two that overlap
        # NaN on one rank, infinity on two, both on one.
        mine = {"a": NAN} if group.rank == last else {}
        mine |= {"e": -INF, "b": INF} if group.rank in (0, last) else {}
        with pytest.raises(NonFiniteError) as error:
            given_.backward(given_.spoiled(mine))
        both = (0, last) if last else (0,)
        assert found(error) == {"a": (last,), "b": both, "e": both}
        assert given_.optimizer.nonfinite_gradients == error.value.gradients
        assert math.isnan(given_.params["a"].grad[-1])  # it can still be read
        with pytest.raises(NonFiniteError):  # nor does step() take them
            given_.optimizer.step()
        assert same_bits(given_.values(), [torch.ones_like(p) for p in given_.params.values()])
        given_.optimizer.zero_grad()
        given_.backward(given_.ones())
        assert given_.optimizer.nonfinite_gradients == ()
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in given_.params.values())
        given_.optimizer.zero_grad()


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overlap", [True, False])
def test_what_is_not_finite_is_named_on_every_rank(hosts, dtype, overlap) -> None:
    run_ranks(
        len(hosts), lambda group: check_that_they_are_named(group, dtype, overlap), hosts=hosts
    )


@pytest.mark.mpi
def test_what_is_not_finite_is_named_between_processes() -> None:
    pycomm.init()
    check_that_they_are_named(world_group(), torch.float32, True)


def test_the_error_says_where_to_look() -> None:
    def rank(group: Group) -> NonFiniteError:
        given_ = Given(group, sizes={f"p{i}": (4,) for i in range(12)})
        given_.backward(given_.ones())
        given_.optimizer.step()
        given_.optimizer.zero_grad()
        places = {f"p{i}": NAN for i in range(12)} if group.rank == 1 else {"p3": INF}
        with pytest.raises(NonFiniteError) as error:
            given_.backward(given_.spoiled(places))
        return error.value

    errors = run_ranks(2, rank)
    assert len({error.gradients for error in errors}) == 1
    for number, error in enumerate(errors):
        assert isinstance(error, FloatingPointError)
        text = str(error)
        assert text.startswith(f"the gradients of step 2 are not finite, on rank {number} as on")
        assert "'p0' (bucket 0): rank 1 brought NaN or infinity" in text
        assert "'p3' (bucket 0): ranks 0, 1 brought NaN or infinity" in text
        assert "and 4 more" in text and "p9" not in text
        assert "the loss of ranks 0, 1." in text and "zero_grad()" in text
        copied = pickle.loads(pickle.dumps(error))
        assert str(copied) == text and copied.gradients == error.gradients


def test_a_training_loop_with_an_infinite_batch_goes_on_after_the_error() -> None:
    """Real layers, of several strides: a convolution in channels-last order is copied elsewhere."""
    torch.manual_seed(2)
    models = [
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).to(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())

    def rank(group: Group) -> list[Tensor]:
        model = models[group.rank]
        optimizer = DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01),
            model.named_parameters(),
            group=group,
            check_finite="error",
        )
        raised, blamed = 0, set()
        for step in range(6):
            optimizer.zero_grad()
            x = torch.full((2, 2, 4, 4), 1.0 + group.rank)
            if step in (0, 3) and group.rank == 1:
                x[0, 0, 0, 0] = INF
            try:
                model(x).square().mean().backward()
            except NonFiniteError as error:
                raised += 1
                blamed |= {gradient.ranks for gradient in error.gradients}
                continue
            optimizer.step()
        assert raised == 2
        assert blamed == {(1,)}
        return [p.detach() for p in model.parameters()]

    first, second = run_ranks(2, rank)
    assert same_bits(first, second)
    assert all(p.isfinite().all() for p in first)


# --- skip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 0, 1, 1]], ids=str)
def test_skipped_steps_change_nothing_on_any_rank(hosts) -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, check_finite="skip")
        skipped = 0
        for step in range(6):
            bad = step in (0, 2, 3)
            before = given_.values(), pickle.dumps(given_.optimizer.state_dict())
            given_.optimizer.zero_grad()
            culprit = group.rank == group.size - 1
            given_.backward(given_.spoiled({"c": NAN} if bad and culprit else {}))
            assert given_.params["c"].grad.isnan().any() == bad
            given_.optimizer.step()
            skipped += bad
            assert given_.optimizer.skipped_steps == skipped
            after = given_.values(), pickle.dumps(given_.optimizer.state_dict())
            assert same_bits(before[0], after[0]) == bad
            assert (before[1] == after[1]) == bad
            expected = (NonFiniteGradient("c", (group.size - 1,), bucket=1),) if bad else ()
            names = [(g.name, g.ranks) for g in given_.optimizer.nonfinite_gradients]
            assert names == [(g.name, g.ranks) for g in expected]

    run_ranks(len(hosts), rank, hosts=hosts)


def test_clipping_before_a_skipped_step() -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, check_finite="skip")
        given_.backward(given_.spoiled({"a": INF} if group.rank else {}))
        nn.utils.clip_grad_norm_(given_.params.values(), 1.0)  # NaN, all of them
        given_.optimizer.step()
        assert given_.optimizer.skipped_steps == 1
        assert same_bits(given_.values(), [torch.ones_like(p) for p in given_.params.values()])

    run_ranks(2, rank)


def test_a_grad_scaler_counts_its_own_steps_and_we_name_the_rank() -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, check_finite="skip")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            given_.optimizer.zero_grad()
            gradients = given_.spoiled({"b": INF} if step == 1 and group.rank else {})
            loss = sum((given_.params[name] * grad).sum() for name, grad in gradients.items())
            scaler.scale(loss).backward()
            ranks = [gradient.ranks for gradient in given_.optimizer.nonfinite_gradients]
            assert ranks == ([(1,)] if step == 1 else [])
            scaler.step(given_.optimizer)
            scaler.update()
        assert given_.optimizer.skipped_steps == 0
        assert scaler.get_scale() == 2.0
        assert given_.values()[0][0] == 1 - 0.25 * (1 + 1.5 + 1.75)

    run_ranks(2, rank)


def test_closures() -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, check_finite="skip")
        values = iter([NAN, 1.0, 1.0])

        def closure() -> Tensor:
            given_.optimizer.zero_grad()
            value = next(values)
            given_.backward(given_.spoiled({"a": value} if group.rank == 0 else {}))
            return torch.tensor(3.0 + group.rank)

        for step in range(3):
            before = given_.values()
            assert given_.optimizer.step(closure) == 3.5
            assert same_bits(before, given_.values()) == (step == 0)
            assert given_.optimizer.skipped_steps == 1

    run_ranks(2, rank)


def test_lbfgs_cannot_skip_a_step_that_it_has_begun() -> None:
    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.ones(3))
        optimizer = DistributedOptimizer(
            torch.optim.LBFGS([weight], lr=0.1), [("w", weight)], group=group, check_finite="skip"
        )
        evaluations = 0

        def closure() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            optimizer.zero_grad()
            loss = weight.square().sum()
            (loss * (NAN if evaluations in bad and group.rank else 1.0)).backward()
            return loss.detach()

        bad = {1}
        optimizer.step(closure)
        assert optimizer.skipped_steps == 1 and evaluations == 1
        assert torch.equal(weight, torch.ones(3))
        bad = {4}
        with pytest.raises(NonFiniteError, match=r"'w' .*rank 1"):
            optimizer.step(closure)
        assert evaluations == 4 and optimizer.skipped_steps == 1

    run_ranks(2, rank)


# --- sums that overflow ---------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", HOSTS[1:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_nobodys_fault(hosts, dtype) -> None:
    largest = torch.finfo(dtype).max

    def rank(group: Group) -> None:
        given_ = Given(group, dtype=dtype, op=ReduceOp.SUM)
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="the sum overflowed; no rank brought") as err:
                given_.backward(given_.spoiled({"a": largest, "e": -largest}))
            assert found(err) == {"a": (), "e": ()}
            assert "the loss of rank" not in str(err.value)
            given_.optimizer.zero_grad()
            # The largest of one rank is no overflow.
            given_.backward(
                given_.spoiled({"a": largest, "e": -largest} if group.rank == 0 else {})
            )
            assert given_.params["a"].grad[-1] == largest
            given_.optimizer.zero_grad()

    run_ranks(len(hosts), rank, hosts=hosts)


def test_a_mean_of_16_bit_gradients_does_not_overflow() -> None:
    """It is taken in float32."""

    def rank(group: Group) -> None:
        given_ = Given(group, dtype=torch.float16)
        given_.backward(given_.spoiled({"e": 65504.0}))
        assert given_.params["e"].grad.max() == 65504

    run_ranks(4, rank, hosts=[0, 0, 1, 1])


# --- which gradients count ------------------------------------------------------------------------


def test_unused_parameters() -> None:
    def rank(group: Group) -> None:
        given_ = Given(group)
        optimizer = given_.optimizer
        ones = given_.ones()
        given_.backward({"a": ones["a"], "e": ones["e"]})  # b and c by nobody
        optimizer.zero_grad()
        # Used by rank 1 alone.
        mine = {"c": torch.full((5, 7), NAN)} if group.rank == 1 else {"a": ones["a"]}
        with pytest.raises(NonFiniteError) as error:
            given_.backward(mine)
        assert found(error) == {"c": (1,)}
        assert given_.params["b"].grad is None
        # The next pass leaves it where it is: the step would still take it.
        given_.params["a"].grad = None
        with pytest.raises(NonFiniteError) as error:
            given_.backward({"a": ones["a"]})
        assert found(error) == {"c": (0, 1)}
        # Until it is dropped.
        for param in given_.params.values():
            param.grad = None
        given_.backward({"a": ones["a"]})
        optimizer.step()

    run_ranks(2, rank)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("no_sync", [True, False])
def test_accumulated_gradients(world_size, no_sync) -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, backward_passes_per_step=1 if no_sync else 2)
        optimizer = given_.optimizer
        for bad in (None, 0, 1, None):
            optimizer.zero_grad()
            culprit = group.rank == group.size - 1

            def gradients(number: int, bad=bad, culprit=culprit) -> Gradients:
                return given_.spoiled({"b": NAN} if number == bad and culprit else {})

            if no_sync:
                with optimizer.no_sync():
                    given_.backward(gradients(0))
            else:
                given_.backward(gradients(0))
            if bad is None:
                given_.backward(gradients(1))
                optimizer.step()
                continue
            with pytest.raises(NonFiniteError) as error:
                given_.backward(gradients(1))
            assert found(error) == {"b": (group.size - 1,)}

    run_ranks(world_size, rank)


def test_what_autograd_adds_where_it_lies() -> None:
    """zero_grad(set_to_none=False) keeps the views, so nothing is copied."""

    def rank(group: Group) -> None:
        given_ = Given(group)
        given_.backward(given_.ones())
        for value in (1.0, NAN, 1.0, INF, 1.0):
            given_.optimizer.zero_grad(set_to_none=False)
            gradients = given_.spoiled({"c": value} if group.rank == 1 else {})
            if math.isfinite(value):
                given_.backward(gradients)
                continue
            with pytest.raises(NonFiniteError) as error:
                given_.backward(gradients)
            assert found(error) == {"c": (1,)}

    run_ranks(2, rank)


def test_a_parameter_whose_gradient_comes_in_pieces() -> None:
    """Re-entrant checkpoints fire its hook twice: the second piece may be the bad one."""

    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.ones(4))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=0.1), [("w", weight)], group=group, check_finite="error"
        )
        for first, second in [(1, 1), (1, 1), (NAN, 1), (1, NAN), (INF, -INF), (1, 1)]:
            optimizer.zero_grad()
            total = torch.zeros((), requires_grad=True)
            for factor in (first, second):
                times = factor if group.rank == 0 else 1
                total = total + torch.utils.checkpoint.checkpoint(
                    lambda x, times=times: (weight * times * x).sum(),
                    torch.ones(4, requires_grad=True),
                    use_reentrant=True,
                )
            if first == second == 1:
                total.backward()
                continue
            with pytest.raises(NonFiniteError) as error:
                total.backward()
            assert found(error) == {"w": (0,)}

    run_ranks(2, rank)


def test_ranks_without_batches_raise_too_and_skip_alike() -> None:
    def rank(group: Group) -> float:
        given_ = Given(group, check_finite="skip")
        with join(group=group):
            for step in range(3 if group.rank == 0 else 1):
                given_.optimizer.zero_grad()
                given_.backward(given_.spoiled({"a": NAN} if step == 1 else {}))
                given_.optimizer.step()
        if group.rank == 0:
            assert given_.optimizer.skipped_steps == 1
        loud = Given(group)

        def train_unevenly() -> None:
            with join(group=group):
                for step in range(2 if group.rank == 0 else 1):
                    loud.optimizer.zero_grad()
                    loud.backward(loud.spoiled({"a": NAN} if step == 1 else {}))

        with pytest.raises(NonFiniteError, match=r"'a' .*: rank 0 brought"):
            train_unevenly()
        return given_.params["a"][0].item()

    first, second = run_ranks(2, rank)
    assert first == second == 1 - 0.25 * (1 + 1.5)


# --- compressors ----------------------------------------------------------------------------------


class Overflowing:
    """Makes infinity of 4."""

    def compress(self, bucket):
        with np.errstate(over="ignore"):
            return bucket.values * np.float32(2.0**126)

    def decompress(self, payloads, bucket):
        bucket.values[:] = payloads.sum(axis=0)


@pytest.mark.parametrize(
    "compressor",
    [compression.Float16(), compression.BlockwiseInt8(), compression.TopK(0.5)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_gradients(compressor, dtype) -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, compressor=compressor, dtype=dtype)
        for bad in (False, True, False, True, False):
            given_.optimizer.zero_grad()
            if not bad:
                given_.backward(given_.ones())
                given_.optimizer.step()
                continue
            with pytest.raises(NonFiniteError) as error:
                given_.backward(given_.spoiled({"e": NAN} if group.rank == 1 else {}))
            assert found(error)["e"] == (1,)

    run_ranks(2, rank)


def test_a_compressor_that_overflows() -> None:
    def rank(group: Group) -> None:
        given_ = Given(group, compressor=Overflowing())
        with pytest.raises(NonFiniteError, match="no rank brought it") as error:
            given_.backward({name: 4 * ones for name, ones in given_.ones().items()})
        assert found(error) == {"a": (), "b": (), "c": (), "e": ()}

    run_ranks(2, rank)


# --- ShardedOptimizer -----------------------------------------------------------------------------


class Sharded:
    """Parameters with given gradients, whose optimizer is shared out."""

    def __init__(self, group: Group, dtype: torch.dtype = torch.float32, **options: object) -> None:
        self.last = group.rank == group.size - 1
        self.params = [
            nn.Parameter(torch.ones(n, dtype=dtype)) for n in [(3,), (40, 30), (0,), (7, 5)]
        ]
        self.params[3] = nn.Parameter(torch.ones(5, 7, dtype=dtype).t())
        self.optimizer = pycomm.ShardedOptimizer(
            torch.optim.SGD, self.params, lr=0.25, momentum=0.5, group=group, **options
        )

    def give(self, places: dict[int, float]) -> None:
        """Ones, but for the last element of some; row by row, as autograd has them at times."""
        for number, param in enumerate(self.params):
            param.grad = torch.ones(param.shape, dtype=param.dtype)
            if number in places:
                param.grad.view(-1)[-1] = places[number]

    def found(self) -> dict[str, tuple[int, ...]]:
        return {g.name: g.ranks for g in self.optimizer.nonfinite_gradients}


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_out_optimizers_name_them_and_skip_alike(hosts, dtype) -> None:
    def rank(group: Group) -> None:
        first = "param_groups[0][0]"
        last = "param_groups[0][3]"
        run = Sharded(group, dtype, check_finite="skip")
        for step in range(4):
            before = [param.detach().clone() for param in run.params]
            bad = {0: NAN} if group.rank == 0 else {}
            bad |= {3: -INF} if run.last else {}
            run.give(bad if step in (0, 2) else {})
            run.optimizer.step()
            assert run.found() == ({first: (0,), last: (group.size - 1,)} if step % 2 == 0 else {})
            assert same_bits(before, [p.detach() for p in run.params]) == (step % 2 == 0)
            assert run.optimizer.skipped_steps == step // 2 + 1
            run.optimizer.zero_grad()
        loud = Sharded(group, dtype, check_finite="error")
        for _ in range(2):
            loud.give({1: INF} if run.last else {})
            for call in (loud.optimizer.step, lambda: loud.optimizer.clip_grad_norm_(1.0)):
                with pytest.raises(
                    NonFiniteError, match=r"step 1 .*\n  'param_groups\[0\]\[1\]': rank"
                ):
                    call()
            loud.optimizer.zero_grad()
        loud.give({})
        loud.optimizer.step()

    run_ranks(len(hosts), rank, hosts=hosts)


@pytest.mark.parametrize("element", [0, -1])
def test_shared_out_sums_that_overflow(element) -> None:
    """One rank alone has the element that did."""

    def rank(group: Group) -> None:
        run = Sharded(group, check_finite="skip", op=ReduceOp.SUM)
        run.give({})
        run.params[1].grad.view(-1)[element] = 3e38
        run.optimizer.step()
        assert run.found() == {"param_groups[0][1]": ()}
        assert run.optimizer.skipped_steps == 1

    run_ranks(3, rank)


# --- any gradients --------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -2.5, 1e-45, 1.7e38, -1.7e38, 3.4e38, -3.4e38, INF, -INF, NAN]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_what_is_found_is_what_a_look_at_every_gradient_finds(data) -> None:
    """Whatever ranks bring, all of them find the same, and what a sequential fold would have."""
    hosts = data.draw(st.sampled_from(HOSTS))
    op = data.draw(st.sampled_from([ReduceOp.SUM, ReduceOp.AVG]))
    sizes = {
        f"p{i}": (n,)
        for i, n in enumerate(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5)))
    }
    inputs = []
    for _ in hosts:
        mine = {}
        for name, (n,) in sizes.items():
            values = data.draw(st.lists(st.sampled_from(SPECIAL), min_size=n, max_size=n))
            used = data.draw(st.booleans()) or name == "p0"
            if used:
                mine[name] = torch.tensor(values)
        inputs.append(mine)
    by_host = [[r for r, h in enumerate(hosts) if h == host] for host in dict.fromkeys(hosts)]
    expected = {}
    for name in sizes:
        grads = [mine.get(name) for mine in inputs]
        total = fold(grads, len(hosts) if op is ReduceOp.AVG else 1, by_host)
        if total is not None and not total.isfinite().all():
            expected[name] = tuple(
                rank for rank, g in enumerate(grads) if g is not None and not g.isfinite().all()
            )

    def rank(group: Group) -> list[dict[str, tuple[int, ...]]]:
        given_ = Given(group, sizes=sizes, op=op, check_finite="skip")
        results = []
        for _ in range(2):
            given_.optimizer.zero_grad()
            given_.backward(inputs[group.rank])
            found_ = given_.optimizer.nonfinite_gradients
            results.append({gradient.name: gradient.ranks for gradient in found_})
        return results

    for results in run_ranks(len(hosts), rank, hosts=hosts):
        assert results == [expected, expected]


# --- refusals -------------------------------------------------------------------------------------


def test_ranks_that_want_different_checks() -> None:
    with pytest.raises(RankError, match="check_finite='skip'") as error:
        run_ranks(2, lambda group: Given(group, check_finite="skip" if group.rank else None))
    assert isinstance(error.value.__cause__, MismatchError)


@pytest.mark.parametrize(
    "options", [{"check_finite": "warn"}, {"verify": "hash"}, {"verify_every": 0}], ids=str
)
def test_unknown_checks_are_refused(options) -> None:
    name = next(iter(options))
    with pytest.raises(RankError, match=rf"{name} is .*\. Pass ") as error:
        run_ranks(2, lambda group: Given(group, **options))
    assert isinstance(error.value.__cause__, InvalidArgumentError)


def test_the_names_are_public() -> None:
    assert pycomm.NonFiniteError is NonFiniteError
    assert pycomm.NonFiniteGradient is NonFiniteGradient
