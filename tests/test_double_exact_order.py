"""``precision="exact_order"``: on GPUs, which are a double here, the bits that the host gives."""

import pytest
import torch
from double_gpu import from_gpu, module_on_gpu, on_gpu, run_double_gpu_ranks
from run_ranks import run_ranks
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import pycomm
from pycomm import _core
from pycomm.errors import InvalidArgumentError, MismatchError

needs_double = pytest.mark.skipif(
    _core.gpu_report(_core.GpuPlaces()).headers.startswith("not in this build"),
    reason="built without the headers of CUDA and NCCL",
)
HOSTS = [0, 0, 1]  # of three ranks


def numbers(rank: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of all sizes: their sum depends on the order and on the rounding."""
    generator = torch.Generator().manual_seed(rank)
    exponents = torch.randn(shape, generator=generator) * 4
    return (torch.randn(shape, generator=generator) * exponents.exp2()).to(dtype)


def overwritten(call, *arguments, **keywords):
    """The first argument, after a call that overwrites it."""
    call(*arguments, **keywords)
    return arguments[0]


CASES = {
    "all_reduce": lambda t, **options: pycomm.all_reduce(t, **options),
    "all_reduce avg, scaled": lambda t, **options: pycomm.all_reduce(
        t, pycomm.ReduceOp.AVG, prescale=0.3, postscale=3, **options
    ),
    "all_reduce later": lambda t, **options: pycomm.all_reduce(t, async_op=True, **options).wait(),
    "all_reduce_": lambda t, **options: overwritten(pycomm.all_reduce_, t, **options),
    "reduce": lambda t, **options: pycomm.reduce(t, 2, **options),
    "reduce_": lambda t, **options: overwritten(pycomm.reduce_, t, 2, **options),
    "reduce_scatter": lambda t, **options: pycomm.reduce_scatter(t, **options),
    "reduce_scatter_into": lambda t, **options: overwritten(
        pycomm.reduce_scatter_into, t.new_zeros(2, 50), t, **options
    ),
    "all_reduce_grouped": lambda t, **options: pycomm.all_reduce_grouped([t, t.float()], **options),
    "all_reduce_grouped_": lambda t, **options: overwritten(
        pycomm.all_reduce_grouped_, [t, t.float()], **options
    ),
    "reduce_scatter_grouped": lambda t, **options: pycomm.reduce_scatter_grouped(
        [t, t.float()], **options
    ),
}


def on_double(name: str, **options) -> list[object]:
    def body(group):
        result = CASES[name](on_gpu(numbers(group.rank, 6, 50), group.rank), group=group, **options)
        return tree_map_only(Tensor, from_gpu, result)

    return run_double_gpu_ranks(3, body, hosts=HOSTS)


@needs_double
@pytest.mark.parametrize("name", CASES)
def test_double_exact_order_gives_the_bits_of_the_host(name):
    on_host = run_ranks(
        3, lambda group: CASES[name](numbers(group.rank, 6, 50), group=group), hosts=HOSTS
    )
    torch.testing.assert_close(on_double(name, precision="exact_order"), on_host, rtol=0, atol=0)
    with pytest.raises(AssertionError):  # and the double's NCCL does not
        torch.testing.assert_close(on_double(name), on_host, rtol=0, atol=0)


@needs_double
@pytest.mark.parametrize("bucket_cap_bytes", [1, 1 << 20])
def test_double_gradients_in_exact_order_have_the_bits_of_the_host(bucket_cap_bytes):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()

    def train(net: nn.Module, group, place, **options) -> list[Tensor]:
        optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.5), net.named_parameters(), group=group,
            bucket_cap_bytes=bucket_cap_bytes, **options,
        )  # fmt: skip
        for step in range(3):
            optimizer.zero_grad()
            for number, param in enumerate(net.parameters()):
                param.grad = place(numbers(10 * step + 100 * number + group.rank, *param.shape))
            optimizer.step()
        return [param.grad.detach() for param in net.parameters()]

    def copy_of() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).bfloat16()
        made.load_state_dict(net.state_dict())
        return made

    def trained_on_double(**options) -> list[list[Tensor]]:
        def body(group):
            placed = module_on_gpu(copy_of(), group.rank)
            gradients = train(placed, group, lambda t: on_gpu(t, group.rank), **options)
            return [from_gpu(gradient) for gradient in gradients]

        return run_double_gpu_ranks(3, body, hosts=HOSTS)

    on_host = run_ranks(3, lambda group: train(copy_of(), group, lambda t: t), hosts=HOSTS)
    exact = trained_on_double(precision="exact_order")
    torch.testing.assert_close(exact, on_host, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(trained_on_double(), on_host, rtol=0, atol=0)


def test_exact_order_on_the_host_changes_nothing():
    def body(group):
        t = numbers(group.rank, 6, 50)
        for call in CASES.values():
            plain, exact = call(t.clone(), group=group), call(
                t.clone(), group=group, precision="exact_order"
            )  # fmt: skip
            torch.testing.assert_close(exact, plain, rtol=0, atol=0)

    run_ranks(3, body, hosts=HOSTS)


def test_exact_order_is_followed_by_autograd():
    def body(group):
        t = numbers(group.rank, 6, dtype=torch.float32).requires_grad_()
        pycomm.all_reduce(t, precision="exact_order", group=group).sum().backward()
        pycomm.reduce_scatter(t, precision="exact_order", group=group).sum().backward()
        pycomm.reduce(t, precision="exact_order", group=group).sum().backward()
        return t.grad.tolist()

    assert run_ranks(3, body, hosts=HOSTS) == [[5.0] * 6] * 3


def test_another_precision_or_the_ring_is_refused():
    def body(group):
        t = numbers(group.rank, 6, 50)
        for call in CASES.values():
            with pytest.raises(InvalidArgumentError, match="precision is 'float32'"):
                call(t, group=group, precision="float32")
        with pytest.raises(InvalidArgumentError, match='algorithm is "ring", which folds in ano'):
            pycomm.all_reduce(t, precision="exact_order", algorithm="ring", group=group)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=1)
        with pytest.raises(InvalidArgumentError, match="precision is 'exact'"):
            pycomm.DistributedOptimizer(optimizer, group=group, precision="exact")

    run_ranks(3, body, hosts=HOSTS)


def test_exact_order_on_one_rank_alone_is_a_mismatch():
    def body(group):
        precision = "exact_order" if group.rank == 0 else None
        with pytest.raises(MismatchError, match="exact_order"):
            pycomm.all_reduce(numbers(group.rank, 8), precision=precision, group=group)

    run_ranks(2, body)
