"""Collectives and messages of CUDA tensors, against the same on CPU tensors."""

import gc

import pytest
import torch
from mode import needs_gpu
from torch import Tensor

import pycomm

pytestmark = pytest.mark.gpu

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SUMMED = [*FLOATS, torch.int32, torch.int64, torch.uint8, torch.complex64]


def whole(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, other ones on each rank: sums are exact in any order."""
    t = torch.arange(torch.Size(shape).numel()) % 5 + pycomm.rank() % 3
    return t.reshape(shape).to(dtype)


def drawn(count: int, dtype: torch.dtype) -> Tensor:
    """Of all sizes: a sum depends on order and rounding."""
    generator = torch.Generator().manual_seed(pycomm.rank())
    exponents = 4 * torch.randn(count, generator=generator)
    return (torch.randn(count, generator=generator) * exponents.exp2()).to(dtype)


def check(call, t: Tensor, device: torch.device) -> None:
    """The call gives the bits on the device that it gives on the host."""
    on_host, there = call(t), call(t.to(device))
    if on_host is None:
        assert there is None
        return
    assert there.device == device
    torch.testing.assert_close(bits(there.cpu()), bits(on_host), rtol=0, atol=0)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def rows(*rest: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return whole(2 * pycomm.size(), *rest, dtype=dtype)


@pytest.mark.parametrize("dtype", SUMMED, ids=str)
@pytest.mark.parametrize("count", [0, 1, 1000, 100_003])
def test_all_reduce(device, dtype, count):
    check(pycomm.all_reduce, whole(count, dtype=dtype), device)


@pytest.mark.parametrize("op", ["AVG", "MIN", "MAX", "PROD"])
def test_all_reduce_by_another_op(device, op):
    def call(t):
        return pycomm.all_reduce(t, pycomm.ReduceOp[op])

    on_host, there = call(whole(1000)), call(whole(1000).to(device))
    torch.testing.assert_close(there.cpu(), on_host, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [*SUMMED, torch.bool, torch.int16], ids=str)
def test_what_is_only_moved(device, dtype):
    check(lambda t: pycomm.broadcast(t, pycomm.size() - 1), whole(1000, dtype=dtype), device)
    check(pycomm.all_gather, whole(33, 3, dtype=dtype), device)
    check(lambda t: pycomm.gather(t, 0), whole(33, 3, dtype=dtype), device)
    check(pycomm.all_to_all, rows(7, dtype=dtype), device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_and_reduce_scatter(device, dtype):
    check(lambda t: pycomm.reduce(t, pycomm.size() - 1), whole(1000, dtype=dtype), device)
    check(pycomm.reduce_scatter, rows(501, dtype=dtype), device)


def test_scatter_and_uneven_forms(device):
    root = pycomm.rank() == 0
    t = whole(pycomm.size(), 5) if root else None
    on_host = pycomm.scatter(t)
    there = pycomm.scatter(None if t is None else t.to(device))
    assert torch.equal(there.cpu(), on_host)
    check(
        lambda t: torch.cat(pycomm.all_gather_list(t)), whole(pycomm.rank() + 1, 3), device
    )  # fmt: skip


def test_grouped(device):
    t = whole(40)
    on_host = torch.cat(pycomm.all_reduce_grouped([t, t[:10]]))
    there = torch.cat(pycomm.all_reduce_grouped([t.to(device), t[:10].to(device)]))
    assert torch.equal(there.cpu(), on_host)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", [1, 1000, 100_003, pytest.param(5_000_001, marks=needs_gpu)])
def test_exact_order_has_the_bits_of_the_host(device, dtype, count):
    t = drawn(count, dtype)
    check(lambda t: pycomm.all_reduce(t, precision="exact_order"), t, device)
    check(
        lambda t: pycomm.all_reduce(
            t, pycomm.ReduceOp.AVG, prescale=0.3, precision="exact_order"
        ),
        t, device,
    )  # fmt: skip
    t = drawn(count * pycomm.size(), dtype)
    check(lambda t: pycomm.reduce_scatter(t, precision="exact_order"), t, device)
    check(lambda t: pycomm.reduce(t, precision="exact_order"), t, device)


@needs_gpu
def test_exact_order_in_several_pieces(device):
    t = drawn(40_000_000, torch.bfloat16)  # more than the scratch holds
    check(lambda t: pycomm.all_reduce(t, precision="exact_order"), t, device)


def test_nan_infinity_and_subnormals_in_exact_order(device):
    t = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, -0.0])
    for dtype in FLOATS:
        check(lambda t: pycomm.all_reduce(t, precision="exact_order"), t.to(dtype), device)


@needs_gpu
def test_a_call_lies_between_streams(device):
    """On a stream that is still busy; its result on another one."""
    work, later = torch.cuda.Stream(), torch.cuda.Stream()
    for precision in (None, "exact_order"):
        with torch.cuda.stream(work):
            torch.cuda._sleep(50_000_000)
            t = torch.full((1_000_000,), 1.0 + pycomm.rank(), device=device)
            pending = pycomm.all_reduce(t, precision=precision, async_op=True)
        with torch.cuda.stream(later):
            total = pending.wait().sum(dtype=torch.float64)
        later.synchronize()
        p = pycomm.size()
        assert total.item() == 1e6 * p * (p + 1) / 2


def test_memory_of_dropped_works_is_not_reused_too_early(device):
    for step in range(50):
        t = torch.full((1_000_000,), float(step), device=device)
        pycomm.all_reduce_(t, async_op=True)
        del t
        gc.collect()
        torch.full((1_000_000,), float("nan"), device=device)
    assert torch.equal(pycomm.all_reduce(whole(10).to(device)).cpu(), pycomm.all_reduce(whole(10)))


def test_calls_of_several_groups_interleaved(device):
    groups = [pycomm.new_group(range(pycomm.size())) for _ in range(3)]
    t = whole(10_000).to(device)
    order = range(3) if pycomm.rank() % 2 == 0 else reversed(range(3))
    works = {
        i: [pycomm.all_reduce(t + i, group=groups[i], async_op=True) for _ in range(5)]
        for i in order
    }
    for i in range(3):
        on_host = pycomm.all_reduce(whole(10_000) + i)
        for each in works[i]:
            assert torch.equal(each.wait().cpu(), on_host)


@pytest.mark.parametrize("count", [1, 1000, 3_000_000])
def test_messages_around_a_ring(device, count):
    p, me = pycomm.size(), pycomm.rank()
    if p == 1:
        pytest.skip("one rank has nobody to send to")
    received = torch.empty(count, device=device)
    operations = [
        pycomm.P2POp(pycomm.isend, torch.full((count,), float(me), device=device), (me + 1) % p),
        pycomm.P2POp(pycomm.irecv, received, (me - 1) % p),
    ]
    for work in pycomm.batch_isend_irecv(operations):
        work.wait()
    assert (received == (me - 1) % p).all()


def test_messages_in_both_directions_with_tags(device):
    if pycomm.rank() > 1 or pycomm.size() == 1:
        pytest.skip("of the first two ranks")
    peer = 1 - pycomm.rank()
    pending = [
        pycomm.isend(torch.full((1000,), float(tag), device=device), peer, tag=tag)
        for tag in range(4)
    ]
    for tag in reversed(range(4)):
        t = torch.empty(1000, device=device)
        pycomm.recv(t, peer, tag=tag)
        assert (t == tag).all()
    for work in pending:
        work.wait()


@needs_gpu
def test_a_cuda_tensor_beside_a_cpu_tensor_is_a_mismatch(device):
    if pycomm.size() == 1:
        pytest.skip("one rank has nobody to differ from")
    group = pycomm.new_group(range(pycomm.size()))
    t = whole(10)
    with pytest.raises(pycomm.MismatchError, match="on GPUs"):
        pycomm.all_reduce(t.to(device) if pycomm.rank() == 0 else t, group=group)
    pycomm.all_reduce(t.to(device))  # other groups go on


@needs_gpu
def test_what_nccl_cannot_do_is_refused_and_the_group_goes_on(device):
    with pytest.raises(pycomm.InvalidArgumentError, match="NCCL cannot reduce int16"):
        pycomm.all_reduce(whole(10, dtype=torch.int16).to(device))
    with pytest.raises(pycomm.InvalidArgumentError, match="NCCL chooses by itself"):
        pycomm.all_reduce(whole(10).to(device), algorithm="direct")
    check(pycomm.all_reduce, whole(10), device)


@needs_gpu
def test_a_tensor_on_another_gpu_is_refused(device):
    if torch.cuda.device_count() == 1:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", (device.index + 1) % torch.cuda.device_count())
    with pytest.raises(pycomm.InvalidArgumentError, match="A rank uses one GPU"):
        pycomm.all_reduce(whole(10).to(other))
    check(pycomm.all_reduce, whole(10), device)
