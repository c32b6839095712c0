"""The same parameters, optimizer state and objects on every rank."""

import pickle

import pytest
import torch
from run_ranks import run_ranks
from torch import nn

import pycomm
from pycomm import InvalidArgumentError, MismatchError
from pycomm.collectives import all_reduce
from pycomm.objects import all_gather_object, broadcast_object, gather_object, scatter_object
from pycomm.runtime import world_group
from pycomm.state import broadcast_optimizer_state, broadcast_parameters


class Net(nn.Module):
    """Tied weights, buffers of several dtypes, one of them not persistent."""

    def __init__(self, seed, width=6):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(5, width, _weight=torch.randn(5, width, generator=generator))
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.randn((), generator=generator).double())
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("mask", torch.arange(4) > seed % 4, persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))


def trained(optimizer_of, seed, steps):
    """Parameters and an optimizer that has made ``steps`` steps; ranks differ by ``seed``."""
    generator = torch.Generator().manual_seed(seed)  # torch's own is shared by the rank threads
    matrix, image, vector = (
        torch.randn(shape, generator=generator) for shape in [(4, 3), (2, 3, 4, 4), (2,)]
    )
    params = [
        nn.Parameter(matrix),
        nn.Parameter(image.to(memory_format=torch.channels_last)),
        nn.Parameter(vector.bfloat16()),
    ]
    optimizer = optimizer_of(params)
    params = [p for param_group in optimizer.param_groups for p in param_group["params"]]

    def closure():
        optimizer.zero_grad()
        loss = sum((p.float() ** 2).sum() for p in params)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    optimizer.zero_grad()
    return params, optimizer


OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, amsgrad=True),
    "groups": lambda params: torch.optim.Adam(
        [{"params": params[:1], "lr": 0.3}, {"params": params[1:], "betas": (0.5, 0.6)}]
    ),
    "tensor lr": lambda params: torch.optim.Adam(params, lr=torch.tensor(0.1)),
    "Rprop": lambda params: torch.optim.Rprop(params[:2], lr=0.1),
    "LBFGS": lambda params: torch.optim.LBFGS(params[:1], lr=0.1),
}


def same(a, b):
    """Equal in value, type, dtype and strides, all the way down."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.stride() == b.stride()
            and torch.equal(a, b)
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def check_parameters(group, root):
    model, expected = Net(group.rank), Net(root)
    model.scale.grad = torch.full((), float(group.rank), dtype=torch.float64)
    broadcast_parameters(model, root, group=group)
    for (name, mine), (_, theirs) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*expected.named_parameters(), *expected.named_buffers()],
        strict=True,
    ):
        assert torch.equal(mine, theirs), name
    assert model.head.weight is model.embed.weight
    assert model.scale.grad == group.rank
    assert model.embed.weight.grad is None


def check_optimizer_state(group, optimizer_of, root, steps_of_rank):
    """After the broadcast every rank holds what the root, alone, would hold."""
    _, expected = trained(optimizer_of, root, steps_of_rank(root))
    params, optimizer = trained(optimizer_of, group.rank, steps_of_rank(group.rank))
    before = [p.detach().clone() for p in params]
    broadcast_optimizer_state(optimizer, root, group=group)
    assert same(optimizer.state_dict(), expected.state_dict())
    assert all(p.grad is None for p in params)
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True)), "no step"


def check_objects(group):
    p, rank = group.size, group.rank
    for obj in ({"lr": 0.1, "names": ["a", "b"]}, None, b"", "x" * 100_000, torch.arange(5)):
        for root in (0, p - 1):
            assert same(
                broadcast_object(obj if rank == root else "ignored", root, group=group), obj
            )
    objects = [list(range(rank * 1000)) for rank in range(p)]
    assert all_gather_object(objects[rank], group=group) == objects
    assert all_gather_object(None, group=group) == [None] * p
    for root in (0, p - 1):
        gathered = gather_object(objects[rank], root, group=group)
        assert gathered == (objects if rank == root else None)
        scattered = scatter_object(objects if rank == root else None, root, group=group)
        assert scattered == objects[rank]


# ------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("root", [0, 2])
@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 1, 0]])
def test_broadcast_parameters(hosts, root):
    run_ranks(3, lambda group: check_parameters(group, root), hosts=hosts)


@pytest.mark.parametrize(
    "entries",
    [
        lambda model: model.state_dict(),
        lambda model: model.named_parameters(),
        lambda model: list(model.state_dict().items()),
    ],
    ids=["state_dict", "generator", "list"],
)
def test_what_broadcast_parameters_accepts(entries):
    def body(group):
        model = Net(group.rank)
        broadcast_parameters(entries(model), group=group)
        assert torch.equal(model.embed.weight, Net(0).embed.weight)
        assert torch.equal(model.scale, Net(0).scale)

    run_ranks(2, body)


def test_strides_may_differ_between_ranks():
    def body(group):
        base = torch.arange(24.0).view(2, 3, 4) + 100 * group.rank
        columns_first = base.transpose(0, 2).contiguous().transpose(0, 2)
        tensors = {
            "transposed on the root": base.clone() if group.rank else columns_first,
            "transposed elsewhere": columns_first.clone() if group.rank else base.clone(),
            "strided": base.repeat_interleave(2, dim=2)[..., ::2],
            "expanded": torch.full((3, 1), float(group.rank)).expand(3, 4),
            "conjugated": torch.view_as_complex(base.view(-1, 2).clone()).conj(),
        }
        broadcast_parameters(tensors, group=group)
        base = torch.arange(24.0).view(2, 3, 4)
        for name in ("transposed on the root", "transposed elsewhere", "strided"):
            assert torch.equal(tensors[name], base), name
        assert torch.equal(tensors["expanded"], torch.zeros(3, 4))
        assert torch.equal(tensors["conjugated"], torch.view_as_complex(base.view(-1, 2)).conj())

    run_ranks(2, body)


def usual():
    return [("w", torch.full((2, 3), 7.0)), ("b", torch.ones(3))]


@pytest.mark.parametrize(
    ("others", "odd_one", "message"),
    [
        (
            lambda: Net(0),
            lambda: Net(0, width=7),
            r"tensor 1 differs: rank 0 has 'embed.weight', float32 of shape \(5, 6\), "
            r"rank 2 has 'embed.weight', float32 of shape \(5, 7\)",
        ),
        (
            usual,
            lambda: [*usual()[:1], ("b", torch.ones(4))],
            r"tensor 1 differs: rank 0 has 'b', float32 of shape \(3,\), "
            r"rank 2 has 'b', float32 of shape \(4,\)",
        ),
        (usual, lambda: [*usual()[:1], ("b", torch.ones(3).half())], "rank 2 has 'b', float16"),
        (usual, lambda: [*usual()[:1], ("c", torch.ones(3))], "rank 2 has 'c', float32"),
        (usual, lambda: usual()[:1], "tensor 1 .* rank 2 has only 1 tensors"),
    ],
    ids=["module", "shape", "dtype", "name", "missing"],
)
def test_the_first_difference_is_named_on_all_ranks(others, odd_one, message):
    def body(group):
        mine = odd_one() if group.rank == 2 else others()
        with pytest.raises(MismatchError, match=message):
            broadcast_parameters(mine, group=group)
        assert all_reduce(torch.tensor(1), group=group) == 3, "the group stays usable"

    run_ranks(3, body)


def test_nothing_is_overwritten_before_all_is_compared():
    def body(group):
        first, second = torch.tensor(group.rank), torch.zeros(1 + group.rank)
        with pytest.raises(MismatchError):
            broadcast_parameters([("first", first), ("second", second)], group=group)
        assert first == group.rank

    run_ranks(2, body)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (lambda: [("w", torch.ones(1)), ("w", torch.ones(2))], "the name 'w' appears twice"),
        (lambda: nn.Linear(2, 2).parameters(), "yields a Parameter, not a .name, tensor. pair"),
        (lambda: {"epoch": 3}, "'epoch' is a int, not a tensor.*broadcast_object"),
        (lambda: nn.LazyLinear(3), "'weight' has no shape yet"),
        (lambda: {"w": torch.ones(2, device="meta")}, "'w' is a .* on meta"),
    ],
)
def test_what_one_rank_cannot_broadcast_raises_on_all(parameters, message):
    def body(group):
        mine = parameters() if group.rank == 1 else {"w": torch.ones(1)}
        with pytest.raises(InvalidArgumentError, match=f"failed on rank 1: .*{message}"):
            broadcast_parameters(mine, group=group)
        assert all_reduce(torch.tensor(1), group=group) == 2

    run_ranks(2, body)


# ------------------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize(
    "steps_of_rank",
    [lambda rank: rank, lambda rank: 2 - rank, lambda rank: 3],
    ids=["root fresh", "others fresh", "all in use"],
)
def test_broadcast_optimizer_state(name, steps_of_rank):
    run_ranks(3, lambda group: check_optimizer_state(group, OPTIMIZERS[name], 0, steps_of_rank))


def test_another_root_and_training_goes_on_alike():
    def body(group):
        params, optimizer = trained(OPTIMIZERS["AdamW"], group.rank, group.rank)
        broadcast_optimizer_state(optimizer, 1, group=group)
        broadcast_parameters([(str(i), p) for i, p in enumerate(params)], 1, group=group)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach() for p in params]

    first, *others = run_ranks(3, body, hosts=[0, 1, 1])
    for other in others:
        assert same(first, other)


def test_hyper_parameters_and_schedules_follow_the_root():
    def body(group):
        params, optimizer = trained(OPTIMIZERS["momentum"], group.rank, group.rank)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(2 if group.rank == 0 else 0):
            optimizer.step()
            schedule.step()
        broadcast_optimizer_state(optimizer, group=group)
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.25
        assert optimizer.param_groups[0]["initial_lr"] == 0.1
        assert optimizer.param_groups[0]["params"][0] is params[0]
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == 0.1 * 0.125

    run_ranks(2, body)


class WideState(torch.optim.Optimizer):
    """Keeps float32 state for 16-bit parameters and counts steps in a plain int."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["master"] = state.get("master", p.float() + 1e-4) - group["lr"]
                p.copy_(state["master"])


def test_state_keeps_the_dtype_it_has_on_the_root():
    run_ranks(2, lambda group: check_optimizer_state(group, WideState, 0, lambda rank: 2 - rank))


def test_optimizers_over_different_parameters():
    def body(group):
        p = nn.Parameter(torch.ones(3 + group.rank))
        with pytest.raises(
            MismatchError, match=r"'parameter 0 of group 0', float32 of shape \(3,\)"
        ):
            broadcast_optimizer_state(torch.optim.SGD([p]), group=group)
        assert all_reduce(torch.tensor(1), group=group) == 2

    run_ranks(2, body)


def test_what_is_no_optimizer_on_one_rank_raises_on_all():
    def body(group):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        with pytest.raises(
            InvalidArgumentError, match=r"failed on rank 1: .*optimizer is 3\. Pass a torch.optim"
        ):
            broadcast_optimizer_state(3 if group.rank == 1 else optimizer, group=group)
        assert all_reduce(torch.tensor(1), group=group) == 2

    run_ranks(2, body)


def test_a_state_that_cannot_be_pickled_raises_on_all():
    def body(group):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        optimizer.param_groups[0]["on_step"] = lambda: None
        with pytest.raises(InvalidArgumentError, match=r"failed on rank 0: .*pickle"):
            broadcast_optimizer_state(optimizer, group=group)
        assert all_reduce(torch.tensor(1), group=group) == 2

    run_ranks(2, body)


# --------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("hosts", [[0], [0, 0, 0], [0, 1, 1]])
def test_objects(hosts):
    run_ranks(len(hosts), check_objects, hosts=hosts)


def test_the_root_keeps_its_own_object():
    def body(group):
        obj = {"rank": group.rank}
        received = broadcast_object(obj, 1, group=group)
        assert received == {"rank": 1}
        assert (received is obj) == (group.rank == 1)

    run_ranks(2, body)


class Unpicklable:
    def __reduce__(self):
        raise pickle.PicklingError("this object stays here")


def _explode():
    raise ValueError("this pickle does not open")


class Unopenable:
    def __reduce__(self):
        return _explode, ()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (Unpicklable(), "failed on rank 1: PicklingError: this object stays here"),
        (Unopenable(), "failed on rank 0: ValueError: this pickle does not open"),
    ],
)
def test_what_pickle_refuses_raises_on_all(obj, message):
    def body(group):
        mine = obj if group.rank == 1 else None
        with pytest.raises(InvalidArgumentError, match=f"broadcast_object .*{message}"):
            broadcast_object(mine, 1, group=group)
        with pytest.raises(InvalidArgumentError, match=f"all_gather_object .*{message}"):
            all_gather_object(mine, group=group)
        with pytest.raises(InvalidArgumentError, match=f"scatter_object .*{message}"):
            scatter_object([mine] * 3, 1, group=group)
        with pytest.raises(InvalidArgumentError, match=f"gather_object .*{message}"):
            gather_object(mine, 0, group=group)
        with pytest.raises(InvalidArgumentError, match="root is 3"):
            broadcast_object(mine, 3, group=group)
        assert all_gather_object(group.rank, group=group) == [0, 1, 2]

    run_ranks(3, body)


def test_objects_to_scatter_are_one_for_each_rank():
    def body(group):
        objects = ["too", "few"] if group.rank == 2 else None
        with pytest.raises(InvalidArgumentError, match=r"failed on rank 2.* 2 objects for 3 ranks"):
            scatter_object(objects, 2, group=group)
        with pytest.raises(InvalidArgumentError, match=r"failed on rank 0.* None for 3 ranks"):
            scatter_object(None, 0, group=group)
        assert scatter_object(["a", "b", "c"], 1, group=group) == "abc"[group.rank]

    run_ranks(3, body)


def test_different_object_calls_are_a_mismatch_that_names_both():
    def body(group):
        call = all_gather_object if group.rank == 0 else broadcast_object
        with pytest.raises(MismatchError, match="all_gather_object") as raised:
            call("a", group=group)
        assert "broadcast_object" in str(raised.value)

    run_ranks(2, body)


# ---------------------------------------------------------------------------------- under mpirun


@pytest.mark.mpi
def test_state_of_processes():
    pycomm.init()
    group = world_group()
    check_parameters(group, group.size - 1)
    check_optimizer_state(group, OPTIMIZERS["AdamW"], 0, lambda rank: rank)
    check_optimizer_state(group, OPTIMIZERS["LBFGS"], 0, lambda rank: group.size - rank)


@pytest.mark.mpi
def test_objects_of_processes():
    pycomm.init()
    check_objects(world_group())
