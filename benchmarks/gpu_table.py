"""pycomm and torch.distributed's NCCL in turns, on the same GPUs: a rank of it.

torchrun --standalone --nproc-per-node N benchmarks/gpu_table.py --json figures.json

As nccl-tests measure: the time of one call in a row of them, the slowest rank's, GPU and host
together; here the median over rounds in which every contender has a turn. Sizes are nccl-tests':
the larger of input and output. Of each contender one call is checked first, at both ends of its
output; the timed ones are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pycomm
from pycomm.bench.report import bus_factor

COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv"]
REDUCTIONS = {"all_reduce", "reduce_scatter"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN, EXACT, PEER = "pycomm", "pycomm, exact order", "torch.distributed"

Call = Callable[[], Any]


def pycomm_call(collective: str, output: Tensor, input: Tensor, precision: Any) -> Call:
    p, me = pycomm.size(), pycomm.rank()

    def around() -> None:
        sent = pycomm.P2POp(pycomm.isend, input, (me + 1) % p)
        received = pycomm.P2POp(pycomm.irecv, output, (me - 1) % p)
        for work in pycomm.batch_isend_irecv([sent, received]):
            work.wait()

    calls: dict[str, Call] = {
        "all_reduce": lambda: pycomm.all_reduce_(output, precision=precision),
        "all_gather": lambda: pycomm.all_gather_into(output, input),
        "reduce_scatter": lambda: pycomm.reduce_scatter_into(output, input, precision=precision),
        "broadcast": lambda: pycomm.broadcast_(output, 0),
        "all_to_all": lambda: pycomm.all_to_all_into(output, input),
        "send_recv": around,
    }
    return calls[collective]


def torch_call(collective: str, output: Tensor, input: Tensor) -> Call:
    p, me = dist.get_world_size(), dist.get_rank()

    def around() -> None:
        sent = dist.P2POp(dist.isend, input, (me + 1) % p)
        received = dist.P2POp(dist.irecv, output, (me - 1) % p)
        for work in dist.batch_isend_irecv([sent, received]):
            work.wait()

    calls: dict[str, Call] = {
        "all_reduce": lambda: dist.all_reduce(output),
        "all_gather": lambda: dist.all_gather_into_tensor(output, input),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(output, input),
        "broadcast": lambda: dist.broadcast(output, 0),
        "all_to_all": lambda: dist.all_to_all_single(output, input),
        "send_recv": around,
    }
    return calls[collective]


def buffers(collective: str, nbytes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output and input of a call, whose larger one has about ``nbytes``."""
    p, me = pycomm.size(), pycomm.rank()
    block = max(1, nbytes // dtype.itemsize // p)
    whole = block * p if collective in ("all_gather", "reduce_scatter", "all_to_all") else (
        nbytes // dtype.itemsize
    )  # fmt: skip
    output = torch.empty(block if collective == "reduce_scatter" else whole, dtype=dtype)
    input = torch.empty(block if collective == "all_gather" else whole, dtype=dtype)
    fill(collective, output, me + 1)
    return output.to(DEVICE), input.fill_(me + 1).to(DEVICE)


def fill(collective: str, output: Tensor, value: int) -> None:
    """Where a call reads its output, it reads this."""
    output.fill_(value if collective in ("all_reduce", "broadcast") else 0)


def check(collective: str, call: Call, output: Tensor, what: str) -> None:
    """The call's first and last element are right."""
    p, me = pycomm.size(), pycomm.rank()
    fill(collective, output, me + 1)
    call()
    first, last = output[0].item(), output[-1].item()
    right = {
        "all_reduce": (p * (p + 1) / 2,) * 2,
        "reduce_scatter": (p * (p + 1) / 2,) * 2,
        "all_gather": (1, p),
        "all_to_all": (1, p),
        "broadcast": (1, 1),
        "send_recv": ((me - 1) % p + 1,) * 2,
    }[collective]
    if (first, last) != right:
        raise SystemExit(f"{what} on rank {me} gave {first} ... {last}, not {right}.")


def seconds(call: Call, repeat: int) -> float:
    """Of one call in a row of them, until the GPU has done the last."""
    synchronize()
    pycomm.barrier()
    begun = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize()
    return (time.perf_counter() - begun) / repeat


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def slowest(values: list[float]) -> list[float]:
    t = torch.tensor(values, dtype=torch.float64)
    return [float(x) for x in pycomm.all_reduce(t, pycomm.ReduceOp.MAX)]


def table(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for collective in COLLECTIVES:
        if collective == "send_recv" and pycomm.size() == 1:
            continue
        for name, dtype in DTYPES.items():
            for nbytes in sizes:
                output, input = buffers(collective, nbytes, dtype)
                calls = {OWN: pycomm_call(collective, output, input, None)}
                if collective in REDUCTIONS:
                    calls[EXACT] = pycomm_call(collective, output, input, "exact_order")
                calls[PEER] = torch_call(collective, output, input)
                for contender, call in calls.items():
                    check(collective, call, output, f"{contender}, {collective} of {nbytes} bytes")
                rows.append(
                    {"collective": collective, "dtype": name}
                    | {"nbytes": max(output.nbytes, input.nbytes)}
                    | {"bus_factor": bus_factor(collective, pycomm.size())}
                    | {"seconds": turns(calls, repeat_of(nbytes), rounds)}
                )
                if pycomm.rank() == 0:
                    print(f"{collective} {name} {nbytes}", flush=True)
    return rows


def repeat_of(nbytes: int) -> int:
    return 20 if nbytes <= 16 << 20 else 5


def turns(calls: dict[str, Call], repeat: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of rotated order; the first is not counted."""
    samples: dict[str, list[float]] = {contender: [] for contender in calls}
    names = list(calls)
    for number in range(rounds + 1):
        begin = number % len(names)
        for contender in [*names[begin:], *names[:begin]]:
            taken = seconds(calls[contender], repeat)
            if number:
                samples[contender].append(taken)
    return {name: statistics.median(slowest(values)) for name, values in samples.items()}


def step_table(width: int, rounds: int) -> dict[str, float]:
    """A training step of a wide network, by who synchronises its gradients."""
    contenders: dict[str, Call] = {}
    for name, options in ((OWN, {}), (EXACT, {"precision": "exact_order"}), (PEER, None)):
        torch.manual_seed(0)
        layers = [layer for _ in range(12) for layer in (nn.Linear(width, width), nn.GELU())]
        model = nn.Sequential(*layers).to(DEVICE)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        if options is None:
            module: nn.Module = nn.parallel.DistributedDataParallel(model)
        else:
            module = model
            optimizer = pycomm.DistributedOptimizer(
                optimizer, model.named_parameters(), **options
            )  # fmt: skip
        contenders[name] = step_of(module, optimizer, torch.randn(64, width, device=DEVICE))
    return turns(contenders, repeat=5, rounds=rounds)


def step_of(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Call:
    def step() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where rank 0 writes the figures")
    parser.add_argument("--largest", type=int, default=256 << 20, help="bytes of the last size")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--width", type=int, default=2048, help="of the trained network")
    args = parser.parse_args()
    pycomm.init(timeout_s=120)
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo")
    sizes = [1 << 10]
    while sizes[-1] * 4 <= args.largest:
        sizes.append(sizes[-1] * 4)
    figures = {
        "ranks": pycomm.size(),
        "rounds": args.rounds,
        "peer": f"{dist.get_backend()} of torch {torch.__version__}",
        "rows": table(sizes, args.rounds),
        "width": args.width,
        "step": step_table(args.width, args.rounds),
    }
    if pycomm.rank() == 0:
        args.json.write_text(json.dumps(figures))
    dist.destroy_process_group()
    pycomm.shutdown()


def own_device() -> torch.device:
    """This rank's GPU; where torch has none, the CPU, which checks this program and no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


DEVICE = own_device()

if __name__ == "__main__":
    main()
