"""Replicas of a model that are no longer the same: found, and named, on every rank."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from run_ranks import RankError, run_ranks
from torch import Tensor, nn

import pycomm
from pycomm import _core
from pycomm._core import Group
from pycomm.collectives import all_reduce
from pycomm.errors import DriftError, InvalidArgumentError, MismatchError
from pycomm.join import join
from pycomm.optimizer import DistributedOptimizer
from pycomm.replicas import verify_replicas
from pycomm.runtime import world_group
from pycomm.state import broadcast_parameters
from pycomm.tensor_parallel import ColumnParallelLinear

HOSTS = [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]


class Net(nn.Module):
    """Several dtypes and strides, tied weights, empty ones, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.image = nn.Parameter(draw(3, 2, 5, 4).data.to(memory_format=torch.channels_last))
        self.matrix = draw(70, 3)
        self.tied = self.matrix
        self.scale = nn.Parameter(draw().data.double())
        self.short = nn.Parameter(draw(9).data.bfloat16())
        self.empty = draw(0, 3)
        self.phase = nn.Parameter(torch.complex(draw(2).data, draw(2).data))
        self.register_buffer("mean", torch.zeros(3))


MODEL = Net()


def flip(t: Tensor, element: int, bit: int) -> None:
    """Change one bit of an element, in the order of its indices."""
    dense = t.detach().contiguous().clone()
    dense.view(-1).view(torch.uint8)[element * t.element_size() + bit // 8] ^= 1 << (bit % 8)
    t.detach().copy_(dense)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
@pytest.mark.parametrize("name", ["image", "matrix", "scale", "short", "phase"])
def test_one_bit_on_one_rank_is_named_everywhere_and_can_be_mended(hosts, name) -> None:
    def rank(group: Group) -> str:
        model = copy.deepcopy(MODEL)
        verify_replicas(model, group=group)
        last = group.size - 1
        if group.rank == last:
            flip(model.get_parameter(name), model.get_parameter(name).numel() - 1, 0)
        if last == 0:
            verify_replicas(model, group=group)
            return ""
        with pytest.raises(DriftError) as error:
            verify_replicas(model, group=group)
        broadcast_parameters(model, group=group)  # the group stays usable
        verify_replicas(model, group=group)
        return str(error.value)

    texts = run_ranks(len(hosts), rank, hosts=hosts)
    for number, text in enumerate(texts):
        if len(hosts) == 1:
            continue
        assert text.startswith(f"verify_replicas on rank {number}: '{name}', ")
        majority = {2: "rank 0", 3: "ranks 0, 1", 4: "ranks 0, 1, 2"}[len(hosts)]
        which = rf"ranks: {majority} \([0-9a-f]{{16}}\) against rank {len(hosts) - 1} \("
        assert re.search(which, text), text
        assert "the first of 1 such tensors among 6" in text
        assert "broadcast_parameters" in text


@pytest.mark.mpi
def test_drift_between_processes() -> None:
    pycomm.init()
    group = world_group()
    model = copy.deepcopy(MODEL)
    verify_replicas(model)
    if group.rank == 1:
        flip(model.matrix, 5, 31)
    with pytest.raises(DriftError, match="'matrix'"):
        verify_replicas(model)
    verify_replicas({"scale": model.scale})


def test_most_ranks_are_right_and_the_first_tensor_counts() -> None:
    def rank(group: Group) -> None:
        model = copy.deepcopy(MODEL)
        with torch.no_grad():
            if group.rank in (0, 2):
                model.short += 1
            model.scale += group.rank // 3
            model.phase += group.rank
        where = r"'scale', float64 of shape \(\), .*: ranks 0, 1, 2 .* against rank 3 .*of 3 such"
        with pytest.raises(DriftError, match=where):
            verify_replicas(model, group=group)
        where = r": ranks 0, 2 \(.*\) against ranks 1, 3 \("  # as many: that of the lowest rank
        with pytest.raises(DriftError, match=where):
            verify_replicas([("short", model.short)], group=group)

    run_ranks(4, rank)


def test_strides_may_differ_and_buffers_only_count_if_asked_for() -> None:
    def rank(group: Group) -> None:
        model = copy.deepcopy(MODEL)
        if group.rank == 1:
            model.image.data = model.image.data.contiguous()
            model.mean += 1
        verify_replicas(model, group=group)
        with pytest.raises(DriftError, match="'mean'"):
            verify_replicas(model, buffers=True, group=group)
        with pytest.raises(DriftError, match="'mean'"):
            verify_replicas(model.state_dict(), group=group)

    run_ranks(2, rank)


def test_shares_of_split_layers_are_not_compared() -> None:
    def rank(group: Group) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(ColumnParallelLinear(4, 6, group=group), nn.LayerNorm(6))
        with torch.no_grad():
            model[0].weight.fill_(group.rank)
        verify_replicas(model, group=group)
        with torch.no_grad():
            model[1].weight += group.rank
        with pytest.raises(DriftError, match=r"'1\.weight'"):
            verify_replicas(model, group=group)

    run_ranks(2, rank)


def test_mistakes_and_other_models_leave_the_group_usable() -> None:
    def rank(group: Group) -> None:
        with pytest.raises(InvalidArgumentError, match=r"failed on rank 1: .*not a tensor"):
            verify_replicas({"a": torch.ones(2) if group.rank == 0 else 3}, group=group)
        with pytest.raises(MismatchError, match=r"tensor 0 differs: .*\(2,\).*\(3,\)"):
            verify_replicas({"a": torch.ones(2 + group.rank)}, group=group)
        assert all_reduce(torch.ones(1), group=group) == 2

    run_ranks(2, rank)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_change_of_bits_is_found(data) -> None:
    """Also changes that a sum, or an exclusive or, of the elements would not see."""
    count = data.draw(st.integers(1, 80))
    values = data.draw(st.lists(st.integers(0, 255), min_size=count, max_size=count))
    other = data.draw(
        st.one_of(
            st.permutations(values),
            st.lists(st.integers(0, 255), min_size=count, max_size=count),
        )
    )
    tensors = [torch.tensor(v, dtype=torch.uint8) for v in (values, other)]

    def rank(group: Group) -> bool:
        try:
            verify_replicas([("t", tensors[group.rank])], group=group)
        except DriftError:
            return True
        return False

    assert run_ranks(2, rank) == [values != other] * 2


def test_the_checksum_reads_what_it_is_told_to() -> None:
    t = torch.arange(100, dtype=torch.uint8)
    assert _core.checksum(t.data_ptr(), 100) != _core.checksum(t.data_ptr(), 99)
    assert _core.checksum(0, 0) == 0xEF46DB3751D8E999


# --- verify="checksum" ----------------------------------------------------------------------------


def steps(optimizer: DistributedOptimizer, weight: Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("every", [1, 3])
def test_an_optimizer_compares_after_every_so_many_steps(every) -> None:
    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0),
            [("w", weight)],
            group=group,
            verify="checksum",
            verify_every=every,
        )
        steps(optimizer, weight, 1)  # compared
        with torch.no_grad():
            weight[1] += group.rank
        steps(optimizer, weight, every - 1)  # not compared
        with pytest.raises(
            DriftError,
            match=rf"verify=\"checksum\" on rank .*, after its step {every + 1}: 'w', float32",
        ):
            steps(optimizer, weight, 1)
        assert weight[0] == -1 - every  # the step was made
        broadcast_parameters([("w", weight)], group=group)
        steps(optimizer, weight, every)

    run_ranks(2, rank)


def test_different_weights_at_the_start_are_found_at_the_first_step() -> None:
    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.full((4,), float(group.rank == 2)))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0), [("w", weight)], group=group, verify="checksum"
        )
        with pytest.raises(DriftError, match=r"ranks 0, 1 .* against rank 2"):
            steps(optimizer, weight, 1)
        steps(optimizer, weight, 99)
        with pytest.raises(DriftError):
            steps(optimizer, weight, 1)

    run_ranks(3, rank)


def test_steps_inside_join_do_not_count() -> None:
    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0),
            [("w", weight)],
            group=group,
            verify="checksum",
            verify_every=2,
        )
        with join(group=group):
            steps(optimizer, weight, 5 if group.rank else 2)
        steps(optimizer, weight, 4)  # all ranks compare after the same ones

    run_ranks(2, rank)


def test_skipped_steps_and_closures_count() -> None:
    def rank(group: Group) -> None:
        weight = nn.Parameter(torch.zeros(4))
        optimizer = DistributedOptimizer(
            torch.optim.SGD([weight], lr=1.0),
            [("w", weight)],
            group=group,
            check_finite="skip",
            verify="checksum",
            verify_every=2,
        )
        steps(optimizer, weight, 1)
        with torch.no_grad():
            weight += group.rank

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (weight * float("nan")).sum()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        with pytest.raises(DriftError):
            optimizer.step(closure)
        assert optimizer.skipped_steps == 2

    run_ranks(2, rank)


def test_ranks_that_verify_at_other_steps_are_refused() -> None:
    weight = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    with pytest.raises(RankError, match="verify_every=4"):
        run_ranks(
            2,
            lambda group: DistributedOptimizer(
                torch.optim.SGD([weight[group.rank]]), group=group, verify_every=4 + group.rank
            ),
        )


def test_the_names_are_public() -> None:
    assert pycomm.verify_replicas is verify_replicas
    assert pycomm.DriftError is DriftError
