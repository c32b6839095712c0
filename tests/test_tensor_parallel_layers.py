"""Single layers split over ranks, and the functions between them."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.nn import functional

from pycomm import (
    DistributedOptimizer,
    InvalidArgumentError,
    MismatchError,
    ShardedOptimizer,
    _core,
    broadcast_parameters,
    clip_grad_norm_,
    tensor_parallel,
)
from pycomm.mesh import Mesh
from pycomm.shares import bounds

TURN = threading.Lock()  # ranks are threads here, and torch has one generator a process
close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-12)

# What a rank is given of a tensor, and what it returns.
Part = Callable[[Tensor, int, int], Tensor]


def everything(t: Tensor, ranks: int, rank: int) -> Tensor:
    return t


def rows(t: Tensor, ranks: int, rank: int) -> Tensor:
    begin, end = bounds(len(t), ranks, rank)
    return t[begin:end]


def addend(t: Tensor, ranks: int, rank: int) -> Tensor:
    """One of as many tensors as ranks, whose sum is ``t``, exactly."""
    return t * (rank + 1) if rank < ranks - 1 else t * (1 - (ranks - 1) * ranks // 2)


REGIONS: dict[str, tuple[Callable[..., Tensor], Part, Part, Part, Part]] = {
    # the function; what goes in, comes out; what gradient goes in at the output, comes out
    "copy": (tensor_parallel.copy_to_region, everything, everything, addend, everything),
    "reduce": (tensor_parallel.reduce_from_region, addend, everything, everything, everything),
    "scatter": (tensor_parallel.scatter_to_region, everything, rows, rows, everything),
    "gather": (tensor_parallel.gather_from_region, rows, everything, everything, rows),
    "gather_sequence": (tensor_parallel.gather_from_sequence, rows, everything, addend, rows),
    "reduce_scatter": (
        tensor_parallel.reduce_scatter_to_sequence,
        addend,
        rows,
        rows,
        everything,
    ),
}


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("region", REGIONS)
def test_a_region_and_its_gradient(region: str, ranks: int, dim: int) -> None:
    function, given, returned, gradient_given, gradient_returned = REGIONS[region]
    has_dim = region not in ("copy", "reduce")
    generator = torch.Generator().manual_seed(ranks)
    value, gradient = (torch.randint(-9, 9, (12, 12), generator=generator).double() for _ in "ab")

    def turned(part: Part, t: Tensor, rank: int) -> Tensor:
        """The part along ``dim``."""
        return part(t.movedim(dim, 0), ranks, rank).movedim(0, dim)

    def run(group: _core.Group) -> None:
        x = turned(given, value, group.rank).clone().requires_grad_()
        y = function(x, dim, group=group) if has_dim else function(x, group=group)
        assert torch.equal(y, turned(returned, value, group.rank))
        with torch.no_grad():
            silent = function(x, dim, group=group) if has_dim else function(x, group=group)
        assert torch.equal(silent, y)
        # Through a square, so that the gradient has one, too.
        seed = turned(gradient_given, gradient, group.rank).clone().requires_grad_()
        (found,) = torch.autograd.grad(y, x, seed, create_graph=True)
        assert torch.equal(found, turned(gradient_returned, gradient, group.rank))
        (again,) = torch.autograd.grad(found, seed, x.detach())
        assert torch.equal(again, y.detach())
        if group.size > 1 and region != "copy":  # memory of its own
            y.relu_()

    run_ranks(ranks, run)


def test_shares_that_differ_by_a_row() -> None:
    value = torch.arange(14.0).view(2, 7)

    def run(group: _core.Group) -> None:
        x = value.clone().requires_grad_()
        mine = tensor_parallel.scatter_to_region(x, group=group)
        assert mine.shape == (2, [3, 2, 2][group.rank])
        whole = tensor_parallel.gather_from_region(mine, length=7, group=group)
        assert torch.equal(whole, value)
        whole.backward(value)
        assert torch.equal(x.grad, value)
        with pytest.raises(InvalidArgumentError, match=r"of 8 this rank's share is \d"):
            tensor_parallel.gather_from_region(value[:, :1], length=8, group=group)
        with pytest.raises(InvalidArgumentError, match="Pad the sequence by 1"):
            tensor_parallel.reduce_scatter_to_sequence(torch.ones(5, 2), group=group)
        with pytest.raises(InvalidArgumentError, match="2 dimensions, and dim is 2"):
            tensor_parallel.scatter_to_region(value, 2, group=group)
        with pytest.raises(InvalidArgumentError, match="t is a list"):
            tensor_parallel.scatter_to_region([1.0], group=group)  # type: ignore[arg-type]

    run_ranks(3, run)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_bounds_are_those_of_tensor_split(length: int, ranks: int) -> None:
    expected = [
        (len(part) and int(part[0]), len(part)) for part in torch.arange(length).tensor_split(ranks)
    ]
    found = [bounds(length, ranks, rank) for rank in range(ranks)]
    assert [(begin if end > begin else 0, end - begin) for begin, end in found] == expected


# --- single layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_linear_layers_by_themselves(ranks: int, bias: bool) -> None:
    linear = nn.Linear(7, 5, bias=bias).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    expected = linear(x)
    expected.square().sum().backward()

    def run(group: _core.Group) -> None:
        column = tensor_parallel.ColumnParallelLinear.from_module(
            linear, gather_output=True, group=group
        )
        row = tensor_parallel.RowParallelLinear.from_module(linear, split_input=False, group=group)
        for layer in (column, row):
            y = layer(x)
            close(y, expected)
            y.square().sum().backward()
            for name, share in layer.shares().items():
                own = layer.get_parameter(name).grad
                of_whole = linear.get_parameter(name).grad
                close(own, of_whole.narrow(share.dim, share.begin, own.shape[share.dim]))
            back = layer.to_module()
            assert type(back) is nn.Linear
            for name, param in linear.named_parameters():
                assert torch.equal(back.get_parameter(name), param)
            assert (back.bias is None) is not bias
            assert f"of {[5, 7][layer is row]}" in repr(layer)

    run_ranks(ranks, run)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_by_itself(padding_idx: int | None) -> None:
    table = nn.Embedding(7, 3, padding_idx).double()
    tokens = torch.tensor([[0, 6, 3], [6, 6, 2]])
    table(tokens).square().sum().backward()

    def run(group: _core.Group) -> None:
        layer = tensor_parallel.VocabParallelEmbedding.from_module(table, group=group)
        assert torch.equal(layer(tokens), table(tokens))
        layer(tokens).square().sum().backward()
        begin, end = bounds(7, group.size, group.rank)
        assert torch.equal(layer.weight.grad, table.weight.grad[begin:end])
        back = layer.to_module()
        assert torch.equal(back.weight, table.weight) and back.padding_idx == table.padding_idx
        for token in (7, -1):
            with pytest.raises(InvalidArgumentError, match=f"tokens hold {token}, .* 0 to 6"):
                layer(torch.tensor([1, token]))
        assert layer(torch.zeros(0, dtype=torch.int64)).shape == (0, 3)

    run_ranks(3, run)


def test_layers_that_are_not_there() -> None:
    def run(group: _core.Group) -> None:
        with pytest.raises(InvalidArgumentError, match="out_features is 2, and each of 3 ranks"):
            tensor_parallel.ColumnParallelLinear(4, 2, group=group)
        with pytest.raises(InvalidArgumentError, match="in_features is 2"):
            tensor_parallel.RowParallelLinear(2, 4, group=group)
        with pytest.raises(InvalidArgumentError, match=r"has 7 features, and .* of 7 is [23]"):
            tensor_parallel.RowParallelLinear(7, 4, group=group)(torch.ones(1, 7))
        with pytest.raises(InvalidArgumentError, match="num_embeddings is 1"):
            tensor_parallel.VocabParallelEmbedding(1, 4, group=group)
        with pytest.raises(InvalidArgumentError, match="has max_norm=1"):
            tensor_parallel.VocabParallelEmbedding.from_module(
                nn.Embedding(9, 2, max_norm=1.0), group=group
            )
        with pytest.raises(InvalidArgumentError, match="p is 2"):
            tensor_parallel.SplitDropout(2, dim=0, group=group)
        with pytest.raises(InvalidArgumentError, match="2 dimensions, and dim is 7"):
            tensor_parallel.SplitDropout(0.5, dim=7, group=group)(torch.ones(2, 2))
        with pytest.raises(InvalidArgumentError, match="group is 3"):
            tensor_parallel.ColumnParallelLinear(4, 4, group=3)  # type: ignore[arg-type]

    run_ranks(3, run)


def test_what_changes_between_forward_and_backward_is_seen() -> None:
    """As in any layer, though what this one saves for backward goes through hooks of ours."""
    module = nn.Linear(6, 10, dtype=torch.float64)
    sequence = torch.randn(8, 3, 6, dtype=torch.float64)
    expected = module(sequence)

    def run(group: _core.Group) -> None:
        layer = tensor_parallel.ColumnParallelLinear.from_module(
            module, sequence_dim=0, group=group
        )
        part = rows(sequence, group.size, group.rank).clone().requires_grad_()
        y = layer(part)
        begin, end = bounds(10, group.size, group.rank)
        close(y, expected[..., begin:end])
        with torch.no_grad():
            layer.weight.mul_(2.0)
        with pytest.raises(
            RuntimeError, match=r"a weight .* of shape \(.*\), was changed in place"
        ):
            y.sum().backward()
        part = part.detach().clone()
        y = layer(part)
        part.add_(1.0)
        with pytest.raises(
            RuntimeError, match=r"the input .* of shape \(.*\), was changed in place"
        ):
            y.sum().backward()

    run_ranks(2, run)


def test_what_a_sequence_layer_keeps_in_memory() -> None:
    """Bytes that autograd keeps for one layer: a part of the sequence, not all of it."""
    width, length, ranks = 64, 512, 4
    module = nn.Linear(width, ranks, dtype=torch.float64)

    def run(group: _core.Group) -> tuple[int, int]:
        sizes = []
        for dim in (None, 0):
            layer = tensor_parallel.ColumnParallelLinear.from_module(
                module, sequence_dim=dim, group=group
            )
            rows = length if dim is None else length // ranks
            x = torch.zeros(rows, width, dtype=torch.float64, requires_grad=True) * 1.0
            reference = weakref.ref(x.untyped_storage())
            y = layer(x)
            del x
            storage = reference()
            sizes.append(0 if storage is None else storage.nbytes())
            del storage
            y.sum().backward()
        return sizes[0], sizes[1]

    for whole, part in run_ranks(ranks, run):
        assert whole == length * width * 8
        assert part == whole // ranks


# --- norms, dropout -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["layer", "layer without bias", "plain layer", "rms"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_norms_of_parts_of_a_sequence(kind: str, ranks: int) -> None:
    options: dict[str, Any] = {"dtype": torch.float64}
    if kind == "rms":
        whole, cls = nn.RMSNorm(6, eps=1e-6, **options), tensor_parallel.SequenceRMSNorm
        options["eps"] = 1e-6
    else:
        if kind == "layer without bias":
            options["bias"] = False
        if kind == "plain layer":
            options["elementwise_affine"] = False
        whole, cls = nn.LayerNorm(6, **options), tensor_parallel.SequenceLayerNorm
    x = torch.randn(8, 3, 6, dtype=torch.float64, requires_grad=True)
    for param in whole.parameters():
        nn.init.normal_(param)
    weights = torch.randn(8, 3, 6, dtype=torch.float64)
    (whole(x) * weights).sum().backward()

    def run(group: _core.Group) -> None:
        norm = cls(6, group=group, **options)
        norm.load_state_dict(whole.state_dict())
        part = rows(x.detach(), group.size, group.rank).clone().requires_grad_()
        y = norm(part)
        close(y, rows(whole(x), group.size, group.rank))
        (y * rows(weights, group.size, group.rank)).sum().backward()
        close(part.grad, rows(x.grad, group.size, group.rank))
        for name, param in whole.named_parameters():
            close(norm.get_parameter(name).grad, param.grad)

    run_ranks(ranks, run)


def test_dropout_of_a_part_is_a_part_of_the_mask() -> None:
    """Ranks that draw the same numbers drop what one process drops."""
    whole = torch.randn(4, 6, 5, dtype=torch.float64)
    torch.manual_seed(3)
    expected = functional.dropout(whole, 0.4)
    expected_next = torch.rand(1)

    def run(group: _core.Group) -> None:
        layer = tensor_parallel.SplitDropout(0.4, dim=1, group=group)
        begin, end = bounds(6, group.size, group.rank)
        part = whole[:, begin:end]
        with TURN:
            torch.manual_seed(3)
            dropped, drawn_next = layer(part), torch.rand(1)
        assert torch.equal(dropped, expected[:, begin:end])
        assert torch.equal(drawn_next, expected_next)
        assert layer.eval()(part) is part
        assert "p=0.4, dim=1" in repr(layer)

    run_ranks(3, run)


# --- cross entropy --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_cross_entropy(dtype: torch.dtype, smoothing: float, reduction: Any) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    logits = (40 * torch.randn(4, 3, 11)).to(dtype)
    target = torch.randint(11, (4, 3))
    target[0, 1] = -100
    target[2] = 4
    for ignored in (-100, 4):
        wide = torch.promote_types(dtype, torch.float32)
        given = logits.to(wide, copy=True).requires_grad_()
        y = target.clamp(min=0) if ignored == 4 else target
        expected = functional.cross_entropy(
            given.flatten(0, 1),
            y.flatten(),
            ignore_index=ignored,
            label_smoothing=smoothing,
            reduction=reduction,
        )
        seed = torch.randn(expected.shape, dtype=expected.dtype)
        (gradient,) = torch.autograd.grad(expected, given, seed)

        def run(
            group: _core.Group,
            y: Tensor = y,
            ignored: int = ignored,
            expected: Tensor = expected,
            seed: Tensor = seed,
            gradient: Tensor = gradient,
        ) -> Tensor:
            begin, end = bounds(11, group.size, group.rank)
            part = logits[..., begin:end].clone().requires_grad_()
            loss = tensor_parallel.vocab_parallel_cross_entropy(
                part,
                y,
                vocabulary=11,
                ignore_index=ignored,
                label_smoothing=smoothing,
                reduction=reduction,
                group=group,
            )
            torch.testing.assert_close(
                loss, expected.view(loss.shape), rtol=tolerance, atol=tolerance
            )
            loss.backward(seed.view(loss.shape))
            assert part.grad.dtype is dtype
            torch.testing.assert_close(
                part.grad,
                gradient[..., begin:end].to(dtype),
                rtol=1e-2 if dtype is torch.bfloat16 else tolerance,
                atol=tolerance,
            )
            return loss.detach()

        for ranks in (1, 2, 3):
            losses = run_ranks(ranks, run)
            assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_cross_entropy_of_what_cannot_be() -> None:
    cross_entropy = tensor_parallel.vocab_parallel_cross_entropy
    logits, target = torch.zeros(4, 3), torch.tensor([0, 5, 2, 1])

    def run(group: _core.Group) -> None:
        for problem, arguments, options in [
            (r"share is 4", (logits, target), {"vocabulary": 8}),
            (r"classes are 0 to 5(.|\n)*Pass vocabulary= where", (logits, target + 1), {}),
            (r"target holds 6, and classes are 0 to 5.$", (logits, target + 1), {"vocabulary": 6}),
            (r"target holds -1", (logits, target - 1), {}),
            (r"shape \(4, 3\) and target \(3,\)", (logits, target[:3]), {}),
            (r"torch.int64 and target", (logits.long(), target), {}),
            (r"target torch.float32", (logits, target.float()), {}),
            (r"reduction is 'avg'", (logits, target), {"reduction": "avg"}),
            (r"label_smoothing is 2", (logits, target), {"label_smoothing": 2}),
        ]:
            with pytest.raises(InvalidArgumentError, match=problem):
                cross_entropy(*arguments, group=group, **options)
        assert cross_entropy(logits, target, group=group) > 0  # the group is usable
        assert cross_entropy(logits, torch.full((4,), -100), group=group).isnan()  # as torch's

    run_ranks(2, run)


def test_shares_of_a_vocabulary_that_do_not_fit_together() -> None:
    def run(group: _core.Group) -> None:
        logits = torch.zeros(4, 3 if group.rank == 0 else 2)
        with pytest.raises(MismatchError, match="cross_entropy of 4 classes"):
            tensor_parallel.vocab_parallel_cross_entropy(
                logits, torch.zeros(4, dtype=torch.int64), group=group
            )

    run_ranks(2, run)


def test_ranks_that_are_given_different_data() -> None:
    def of_tokens(group: _core.Group) -> None:
        layer = tensor_parallel.VocabParallelEmbedding(9, 2, group=group)
        with pytest.raises(MismatchError, match=r"of tokens with checksum(.|\n)*let the sampler"):
            layer(torch.tensor([3, group.rank]))

    def of_targets(group: _core.Group) -> None:
        with pytest.raises(MismatchError, match="cross entropy of target with checksum"):
            tensor_parallel.vocab_parallel_cross_entropy(
                torch.zeros(2, 4), torch.tensor([3, group.rank]), group=group
            )

    run_ranks(2, of_tokens)
    run_ranks(2, of_targets)


# --- models with such layers ----------------------------------------------------------------------


class Model(nn.Sequential):
    """Two split layers and a whole one; the table is used twice."""

    def __init__(self, group: _core.Group | None) -> None:
        if group is None:
            table: nn.Module = nn.Embedding(9, 6)
            head: nn.Module = nn.Linear(6, 9, bias=False)
            wide: nn.Module = nn.Linear(6, 7)
            narrow: nn.Module = nn.Linear(7, 6)
        else:
            table = tensor_parallel.VocabParallelEmbedding(9, 6, group=group)
            head = tensor_parallel.ColumnParallelLinear(6, 9, bias=False, group=group)
            wide = tensor_parallel.ColumnParallelLinear(6, 7, group=group)
            narrow = tensor_parallel.RowParallelLinear(7, 6, group=group)
        head.weight = table.weight
        super().__init__(table, nn.LayerNorm(6), wide, narrow, head)


def test_state_of_the_whole_model_and_back() -> None:
    torch.manual_seed(1)
    whole = Model(None)
    for param in whole.parameters():
        nn.init.normal_(param)
    state = whole.state_dict()

    def run(group: _core.Group) -> None:
        mine = Model(group)
        tensor_parallel.load_whole_state_dict(mine, state)
        assert mine[4].weight is mine[0].weight
        back = tensor_parallel.whole_state_dict(mine)
        assert list(back) == list(state)
        assert all(torch.equal(back[name], value) for name, value in state.items())
        before = copy.deepcopy(mine.state_dict())
        for change, problem in [
            ({"2.weight": torch.zeros(7, 5)}, r"'2.weight' has shape \(7, 5\) instead of \(7, 6\)"),
            ({"2.weights": torch.zeros(1)}, "'2.weights' is unknown"),
        ]:
            with pytest.raises(InvalidArgumentError, match=problem):
                tensor_parallel.load_whole_state_dict(mine, state | change)
        with pytest.raises(InvalidArgumentError, match=r"'0\.weight' is missing"):
            tensor_parallel.load_whole_state_dict(mine, {})
        assert all(torch.equal(mine.state_dict()[n], v) for n, v in before.items())

    run_ranks(2, run)


def test_new_layers_have_the_weights_of_whole_ones() -> None:
    torch.manual_seed(2)
    whole, whole_next = Model(None), torch.rand(1)

    def run(group: _core.Group) -> None:
        with TURN:
            torch.manual_seed(2)
            mine, drawn_next = Model(group), torch.rand(1)
        assert torch.equal(drawn_next, whole_next)
        state = tensor_parallel.whole_state_dict(mine)
        assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items())

    run_ranks(2, run)


def test_copies_and_pickles() -> None:
    def run(group: _core.Group) -> None:
        model = Model(group)
        copied = copy.deepcopy(model)
        assert copied[2].group is model[2].group
        assert copied[2].weight is not model[2].weight
        x = torch.tensor([1, 8])
        assert torch.equal(copied(x), model(x))
        with pytest.raises(TypeError, match=r"Save its state_dict\(\)"):
            pickle.dumps(model)

    run_ranks(2, run)


def test_broadcasts_leave_shares_alone_or_refuse() -> None:
    def run(group: _core.Group) -> None:
        mesh = Mesh({"dp": 2, "tp": 2}, group=group)
        model = Model(mesh["tp"])
        with torch.no_grad():
            for param in model.parameters():
                param.fill_(group.rank)
        with pytest.raises(InvalidArgumentError, match=r"'.*weight' is split over the ranks"):
            broadcast_parameters(model, group=group)
        broadcast_parameters(model, group=mesh["tp"])
        assert model[2].weight.eq(group.rank).all()
        assert model[1].weight.eq(2 * mesh.coordinate["dp"]).all()
        broadcast_parameters(model, group=mesh["dp"])
        assert model[2].weight.eq(mesh.coordinate["tp"]).all()
        assert model[1].weight.eq(0).all()

    run_ranks(4, run)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_the_norm_counts_what_is_whole_once(norm_type: float) -> None:
    torch.manual_seed(4)
    whole = Model(None).double()
    state, x = whole.state_dict(), torch.tensor([[1, 8, 0]])
    whole(x).square().sum().backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.1, norm_type)

    def run(group: _core.Group) -> None:
        model = Model(group).double()
        tensor_parallel.load_whole_state_dict(model, state)
        y = model(x)
        tensor_parallel.gather_from_region(y, length=9, group=group).square().sum().backward()
        close(clip_grad_norm_(model, 0.1, norm_type, group=group), expected)
        close(model[1].weight.grad, whole[1].weight.grad)
        begin, end = bounds(7, group.size, group.rank)
        close(model[2].weight.grad, whole[2].weight.grad[begin:end])

    run_ranks(3, run)


def test_norms_that_would_count_something_twice_are_refused() -> None:
    def run(group: _core.Group) -> None:
        mesh = Mesh({"dp": 2, "tp": 2}, group=group)
        model = Model(mesh["tp"]).double()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        whole = Model(None).double()
        expected = math.sqrt(sum(param.numel() for param in whole.parameters()))
        close(clip_grad_norm_(model, 1e9), torch.tensor(expected, dtype=torch.float64))
        with pytest.raises(InvalidArgumentError, match="would be counted more than once"):
            clip_grad_norm_(model, 1.0, group=group)
        with pytest.raises(InvalidArgumentError, match="Pass the module instead"):
            clip_grad_norm_(model.parameters(), 1.0, group=mesh["tp"])

    run_ranks(4, run)


def test_the_norm_of_sixteen_bits_has_room() -> None:
    def run(group: _core.Group) -> None:
        param = nn.Parameter(torch.zeros(4, dtype=torch.float16))
        param.grad = torch.full((4,), 6e4, dtype=torch.float16)
        assert clip_grad_norm_(param, 6e4, group=group) == pytest.approx(1.2e5)
        assert param.grad.tolist() == [3e4] * 4

    run_ranks(1, run)


@pytest.mark.parametrize("make", ["distributed", "sharded"])
def test_optimizers_over_ranks_with_other_shares_are_refused(make: str) -> None:
    def run(group: _core.Group) -> None:
        mesh = Mesh({"dp": 2, "tp": 2}, group=group)
        model = copy.deepcopy(Model(mesh["tp"]))

        def wrapped(over: _core.Group) -> torch.optim.Optimizer:
            if make == "sharded":
                return ShardedOptimizer(torch.optim.SGD, model.parameters(), lr=0.1, group=over)
            return DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), group=over)

        for over in (group, mesh["tp"]):
            with pytest.raises(InvalidArgumentError, match=r"split layer(.|\n)*group=mesh\["):
                wrapped(over)
        wrapped(mesh["dp"])

    run_ranks(4, run)


def test_layers_of_two_groups_have_no_norm() -> None:
    def run(group: _core.Group) -> None:
        other = group.new_group([1, 0])
        assert other is not None
        model = nn.Sequential(
            tensor_parallel.ColumnParallelLinear(4, 4, group=group),
            tensor_parallel.RowParallelLinear(4, 4, group=other),
        )
        with pytest.raises(InvalidArgumentError, match=r"different ranks: \[0, 1\] and \[1, 0\]"):
            clip_grad_norm_(model, 1.0, group=group)

    run_ranks(2, run)


def test_autocast_sends_and_keeps_sixteen_bits() -> None:
    module = nn.Linear(8, 8)

    def run(group: _core.Group) -> None:
        column = tensor_parallel.ColumnParallelLinear.from_module(
            module, sequence_dim=0, group=group
        )
        row = tensor_parallel.RowParallelLinear.from_module(module, sequence_dim=0, group=group)
        x = torch.randn(4, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = row(column(x))
            assert column.double()(x.double()).dtype is torch.float64  # as nn.Linear
            column.float()
        assert y.dtype is torch.bfloat16 and y.shape == (4, 8)
        y.float().sum().backward()
        assert x.grad.dtype is torch.float32 and row.bias.grad.eq(8).all()

    run_ranks(2, run)


def test_a_rank_that_fails_names_itself() -> None:
    def run(group: _core.Group) -> None:
        layer = tensor_parallel.RowParallelLinear(4, 4, group=group)
        if group.rank == 1:
            raise ValueError("no more memory")
        layer(torch.ones(2, 2))

    with pytest.raises(RankError, match="rank 1 of 2: ValueError: no more memory"):
        run_ranks(2, run)
