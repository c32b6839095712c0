"""What every rank of test_hosts.py runs, on hosts of its own and on pretended ones.

A placement is the host of each rank: 0,1,0,1. The ranks must find themselves placed like that. With
--pretend they do because PYCOMM_HOST says so, and can then try one placement after the other.
"""

import argparse
import copy
import faulthandler
import functools
import os
import re
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from test_pipeline import assert_equal_parts, batches, block_model, sgd, trained_alone
from torch import Tensor

import pycomm
from pycomm import _core
from pycomm.pipeline import Pipeline
from pycomm.runtime import world_group

HANGS_AFTER_S = 120.0  # each program, on each placement
COUNTS = [1, 5, 1000, 1_000_003]
TRAIN = Path(__file__).parents[1] / "examples" / "train.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--placements", nargs="+", required=True)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, required=True)
    parser.add_argument("--runs", help="where `train` puts its run folders")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for placement in args.placements:
        host_of_rank = [int(host) for host in placement.split(",")]
        if args.pretend:
            rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"]
            os.environ["PYCOMM_HOST"] = f"host{host_of_rank[int(rank)]}"
        pycomm.init()
        check_placement(host_of_rank, args.pretend)
        for program in args.programs:
            # Every rank shows its stacks; the first that has ends the job.
            faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
            PROGRAMS[program](args)
            if pycomm.rank() == 0:
                print(f"{program} on {placement}: done", flush=True)
        pycomm.shutdown()


def check_placement(host_of_rank: list[int], pretend: bool) -> None:
    """Hosts are numbered in the order of their lowest rank."""
    expected = [
        [rank for rank, host in enumerate(host_of_rank) if host == wanted]
        for wanted in range(max(host_of_rank) + 1)
    ]
    assert pycomm.hosts() == expected, f"{pycomm.hosts()} instead of {expected}"
    assert pycomm.host_rank() == host_of_rank[pycomm.rank()]
    if not pretend:
        assert "PYCOMM_HOST" not in os.environ
        names = pycomm.all_gather_object(socket.gethostname())
        assert names == [f"host{host}" for host in host_of_rank], names


# --- right answers -------------------------------------------------------------------------------


def collectives(args: argparse.Namespace) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for count in COUNTS:
            inputs = [random_tensor(rank, count, dtype) for rank in range(pycomm.size())]
            expected = canonical_sum(inputs)
            for place in (ordinary, in_arena):
                t = place(inputs[pycomm.rank()])
                pycomm.all_reduce_(t)
                assert same_bits(t, expected), f"all_reduce of {count} {dtype}, {place.__name__}"
    for algorithm in list(_core.Algorithm):
        for count in COUNTS:
            # Sums below 2^24: exact in float32 in any order.
            inputs = [whole_numbers(rank, count) for rank in range(pycomm.size())]
            for place in (ordinary, in_arena):
                t = place(inputs[pycomm.rank()])
                reduce_by(algorithm, t)
                assert torch.equal(t, functools.reduce(torch.add, inputs)), (
                    f"{algorithm} of {count}, {place.__name__}"
                )
    for count in COUNTS:
        inputs = [random_tensor(rank, count, torch.float32) for rank in range(pycomm.size())]
        for root, expected in enumerate(inputs):
            t = pycomm.broadcast(inputs[pycomm.rank()], root)
            assert same_bits(t, expected), f"broadcast of {count} from {root}"
        t = pycomm.all_gather(inputs[pycomm.rank()])
        assert same_bits(t, torch.stack(inputs)), f"all_gather of {count}"


def random_tensor(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """Every rank can draw every rank's."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)


def whole_numbers(rank: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return torch.randint(-1000, 1000, (count,), generator=generator).to(torch.float32)


def canonical_sum(inputs: list[Tensor]) -> Tensor:
    """The ranks of a host by rank, then the hosts in order; 16-bit floats are rounded once."""
    dtype = inputs[0].dtype
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    of_hosts = [
        functools.reduce(torch.add, [inputs[rank].to(wide) for rank in ranks])
        for ranks in pycomm.hosts()
    ]
    return functools.reduce(torch.add, of_hosts).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def ordinary(t: Tensor) -> Tensor:
    return t.clone()


def in_arena(t: Tensor) -> Tensor:
    """Where DistributedOptimizer has its gradients, and other ranks of the host can read them."""
    memory = world_group().allocate(t.nbytes)
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel()).copy_(t)


def reduce_by(algorithm: _core.Algorithm, t: Tensor) -> None:
    world_group().all_reduce(
        t.data_ptr(),
        t.data_ptr(),
        t.numel(),
        _core.DType.FLOAT32,
        pycomm.ReduceOp.SUM,
        algorithm=algorithm,
    )


# --- errors --------------------------------------------------------------------------------------


def mismatch(args: argparse.Namespace) -> None:
    """The last rank makes another call than all others."""
    last = pycomm.rank() == pycomm.size() - 1
    groups = [world_group().duplicate() for _ in range(3)]

    def count(group: pycomm.Group) -> None:
        pycomm.all_reduce(torch.ones(1001 if last else 1000), group=group)

    def kind(group: pycomm.Group) -> None:
        t = torch.ones(100_000)
        pycomm.broadcast(t, group=group) if last else pycomm.all_reduce(t, group=group)

    def number_of_calls(group: pycomm.Group) -> None:
        if not last:
            pycomm.barrier(group=group)
        pycomm.all_gather(torch.ones(7), group=group)

    expect_mismatch(count, groups[0], "all_reduce of 1000 float32", "all_reduce of 1001 float32")
    expect_mismatch(kind, groups[1], "all_reduce of 100000 float32", "broadcast of 100000 float32")
    expect_mismatch(number_of_calls, groups[2], "barrier", "all_gather of 7 float32")
    # Groups fail one by one: this one has not.
    pycomm.barrier()


def expect_mismatch(
    call: Callable[[pycomm.Group], None], group: pycomm.Group, by_others: str, by_last: str
) -> None:
    try:
        call(group)
    except pycomm.MismatchError as error:
        text = str(error)
    else:
        raise AssertionError(f"{call.__name__}: no MismatchError on rank {pycomm.rank()}")
    last = pycomm.size() - 1
    assert re.search(rf"rank [^{last}] made {by_others}", text), text
    assert f"rank {last} made {by_last}" in text, text


def fail(args: argparse.Namespace) -> None:
    """The last rank fails while the others wait for it."""
    for step in range(1000):
        if step == 3 and pycomm.rank() == pycomm.size() - 1:
            print("failing at", time.time(), flush=True)
            raise ValueError("bad batch")
        pycomm.all_reduce_(torch.ones(8))


# --- training ------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """The example's --verify folds by ``pycomm.hosts()``, which ``check_placement`` has checked."""
    sys.argv = [str(TRAIN), "--verify", "--epochs", "2", "--runs", args.runs]
    sys.path.insert(0, str(TRAIN.parent))
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    finally:
        torch.set_default_dtype(torch.float32)
        for name, module in list(sys.modules.items()):  # for the next time they are as new
            if Path(getattr(module, "__file__", None) or "").parent == TRAIN.parent:
                del sys.modules[name]


def pipeline(args: argparse.Namespace) -> None:
    """A stage on each rank, and each transfer inside a host or between two."""
    model, data = block_model(), batches(8, 3)
    for schedule in ("1f1b", "zero_bubble"):
        mine = Pipeline(
            copy.deepcopy(model), torch.nn.functional.mse_loss, schedule=schedule, micro_batches=7
        )
        optimizer = sgd(mine.parameters())
        for x, y in data:
            optimizer.zero_grad()
            mine.step(x, y)
            optimizer.step()
        expected, _ = trained_alone(copy.deepcopy(model), data, 7)
        assert_equal_parts(pycomm.all_gather_object(dict(mine.named_parameters())), expected)


PROGRAMS: dict[str, Callable[[argparse.Namespace], None]] = {
    "collectives": collectives,
    "mismatch": mismatch,
    "fail": fail,
    "train": train,
    "pipeline": pipeline,
}

if __name__ == "__main__":
    main()
