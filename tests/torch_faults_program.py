"""Ranks of torch.distributed on pycomm to which something happens; ``forked_ranks`` watches them.

``python torch_faults_program.py folder [name ...]`` runs the scenarios. A rank reports what it
raised; how its process ended, and when, is seen from outside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel does, which takes seconds: once is enough
import torch.distributed as dist
from forked_ranks import Rank, Scenario, run_all
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import pycomm
import pycomm.torch_backend  # in the process that forks the ranks

# Long: who waits for a peer that is gone, or for a call that never comes, is noticed by it.
LONG = timedelta(seconds=100)

SCENARIOS: dict[str, Scenario] = {}


def scenario(size: int = 2, timeout_s: float = 60.0) -> Callable[[Any], Any]:
    def note(body: Any) -> Any:
        SCENARIOS[body.__name__] = Scenario(body, size, timeout_s)
        return body

    return note


def begin(rank: Rank, timeout: timedelta = LONG, **named: Any) -> None:
    named = {"init_method": f"file://{rank.folder / 'store'}", **named}
    dist.init_process_group(
        "pycomm", rank=rank.rank, world_size=rank.size, timeout=timeout, **named
    )
    dist.barrier()


@contextlib.contextmanager
def reporting(rank: Rank, name: str = "error") -> Iterator[None]:
    """Report what is raised here, and how long it took; it is raised on."""
    began = time.monotonic()
    try:
        yield
    except BaseException as error:
        rank.report(
            **{
                name: str(error),
                f"{name} type": type(error).__name__,
                f"{name} seconds": time.monotonic() - began,
            }
        )
        raise


def caught(rank: Rank, call: Callable[[], Any], name: str = "error") -> None:
    with contextlib.suppress(Exception), reporting(rank, name):
        call()


def wait_for(*works: Any) -> None:
    for work in works:
        work.wait()


# --- a peer goes ---------------------------------------------------------------------------------
#
# The last rank leaves in one of three ways while the others wait for it. They do not catch what
# they get: their processes must end by themselves.


def _killed(rank: Rank) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raises(rank: Rank) -> None:
    raise ValueError("of the user's own")


def _exits(rank: Rank) -> None:
    sys.exit(3)


def _ends(rank: Rank) -> None:
    sys.exit(0)


LEAVING = {"killed": _killed, "raises": _raises, "exits": _exits, "ends": _ends}


def _ddp(rank: Rank) -> DistributedDataParallel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1))
    return DistributedDataParallel(model, bucket_cap_mb=0.001)


def _all_reduce(rank: Rank) -> None:
    dist.all_reduce(torch.ones(1000))


def _all_reduce_async(rank: Rank) -> None:
    wait_for(*[dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(3)])


def _future(rank: Rank) -> None:
    dist.all_reduce(torch.ones(1000), async_op=True).get_future().wait()


def _recv(rank: Rank) -> None:
    dist.recv(torch.ones(1000), rank.size - 1)


def _recv_of_any(rank: Rank) -> None:
    dist.irecv(torch.ones(1000)).wait()


def _barrier(rank: Rank) -> None:
    dist.barrier()


def _monitored_barrier(rank: Rank) -> None:
    dist.monitored_barrier()


def _new_group(rank: Rank) -> None:
    dist.new_group()


def _backward(rank: Rank) -> None:
    model = _ddp(rank)
    model(torch.ones(2, 30)).sum().backward()


WAITING = {
    "all_reduce": _all_reduce,
    "all_reduce_async": _all_reduce_async,
    "future": _future,
    "recv": _recv,
    "recv_of_any": _recv_of_any,
    "barrier": _barrier,
    "monitored_barrier": _monitored_barrier,
    "new_group": _new_group,
    "backward": _backward,
}


def _peer_goes(wait: Callable[[Rank], None], leave: Callable[[Rank], None]) -> Any:
    def body(rank: Rank) -> None:
        begin(rank)
        if rank.rank == rank.size - 1:
            if wait is _backward:
                model = _ddp(rank)
                next(model.parameters()).register_hook(lambda grad: leave(rank))
                model(torch.ones(2, 30)).sum().backward()
            time.sleep(0.3)
            leave(rank)
        with reporting(rank):
            wait(rank)
        rank.report(error="none: it went on")

    return body


for _wait_name, _wait in WAITING.items():
    for _leave_name, _leave in LEAVING.items():
        if _leave_name in ("killed", "raises") or _wait_name in ("all_reduce", "recv", "new_group"):
            _size = 3 if _wait_name in ("all_reduce", "monitored_barrier") else 2
            SCENARIOS[f"{_leave_name}_during_{_wait_name}"] = Scenario(
                _peer_goes(_wait, _leave), _size, 60.0
            )


# --- calls that do not match ---------------------------------------------------------------------

MISMATCHES: dict[str, Callable[[Rank], Any]] = {
    "shapes": lambda rank: dist.all_reduce(torch.ones(3 + rank.rank)),
    "dtypes": lambda rank: dist.all_reduce(
        torch.ones(3, dtype=torch.float64 if rank.rank else torch.float32)
    ),
    "ops": lambda rank: dist.all_reduce(
        torch.ones(3), dist.ReduceOp.MAX if rank.rank else dist.ReduceOp.SUM
    ),
    "kinds": lambda rank: dist.barrier() if rank.rank else dist.all_reduce(torch.ones(3)),
    "roots": lambda rank: dist.broadcast(torch.ones(3), rank.rank),
    "futures": lambda rank: (
        dist.all_reduce(torch.ones(3 + rank.rank), async_op=True).get_future().wait()
    ),
    "messages": lambda rank: (
        dist.send(torch.ones(3), 1) if rank.rank == 0 else dist.recv(torch.ones(4), 0)
    ),
    "gathered": lambda rank: dist.all_gather(
        [torch.ones(3 + rank.rank)] * 2, torch.ones(3 + rank.rank)
    ),
}


def _mismatch(call: Callable[[Rank], Any]) -> Any:
    def body(rank: Rank) -> None:
        begin(rank)
        caught(rank, lambda: call(rank))
        caught(rank, lambda: dist.all_reduce(torch.ones(3)), "later")
        dist.destroy_process_group()
        rank.report(destroyed=True)

    return body


for _name, _call in MISMATCHES.items():
    SCENARIOS[f"mismatch_of_{_name}"] = Scenario(_mismatch(_call), 2, 60.0)


@scenario()
def mismatch_in_backward(rank: Rank) -> None:
    begin(rank)
    model = _ddp(rank)

    def another(grad: Any) -> None:
        if rank.rank == 1:
            dist.broadcast(torch.ones(7), 0)

    model.module[2].weight.register_hook(another)
    with reporting(rank):
        model(torch.ones(2, 30)).sum().backward()


# --- time is up ----------------------------------------------------------------------------------


@scenario()
def timeout_of_the_default_group(rank: Rank) -> None:
    begin(rank, timedelta(seconds=2))
    if rank.rank == 1:
        time.sleep(5)
    with reporting(rank):
        dist.all_reduce(torch.ones(3))


@scenario()
def timeout_of_a_subgroup(rank: Rank) -> None:
    begin(rank)
    group = dist.new_group(timeout=timedelta(seconds=1))
    if rank.rank == 1:
        time.sleep(2.5)
    caught(rank, lambda: dist.all_reduce(torch.ones(3), group=group))
    # The default group goes on, and is left in order.
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def timeout_in_backward(rank: Rank) -> None:
    begin(rank, timedelta(seconds=3))
    model = _ddp(rank)
    if rank.rank == 1:
        time.sleep(6)
    with reporting(rank):
        model(torch.ones(2, 30)).sum().backward()


@scenario()
def monitored_barrier_after_a_timeout(rank: Rank) -> None:
    """By which people look for who did not come, when a call has timed out."""
    begin(rank, timedelta(seconds=1))
    if rank.rank == 1:
        time.sleep(4)
    caught(rank, lambda: dist.all_reduce(torch.ones(3)), "reduction")
    caught(rank, lambda: dist.monitored_barrier(timeout=timedelta(seconds=1)))
    caught(rank, lambda: dist.monitored_barrier(timeout=LONG), "again")  # both are there
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def timeout_set_later(rank: Rank) -> None:
    begin(rank)
    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # from 2.14
    set_timeout(timedelta(seconds=1))
    if rank.rank == 1:
        time.sleep(2.5)
    caught(rank, lambda: dist.all_reduce(torch.ones(3)))
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def timeout_of_a_wait(rank: Rank) -> None:
    """The operation goes on, and can be waited for again."""
    begin(rank)
    if rank.rank == 0:
        t = torch.ones(3)
        work = dist.all_reduce(t, async_op=True)
        caught(rank, lambda: work.wait(timedelta(seconds=0.5)))
        work.wait()
        rank.report(sum=t.tolist())
    else:
        time.sleep(1.5)
        t = torch.ones(3)
        dist.all_reduce(t)
        rank.report(sum=t.tolist())
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def timeout_of_meeting(rank: Rank) -> None:
    """A rank never comes to init_process_group."""
    if rank.rank == 1:
        return
    with reporting(rank):
        begin(rank, timedelta(seconds=2))


@scenario()
def timeout_of_a_receive(rank: Rank) -> None:
    begin(rank, timedelta(seconds=2))
    if rank.rank == 0:
        with reporting(rank):
            dist.recv(torch.ones(3), 1)
    else:
        time.sleep(4)
        with reporting(rank):
            dist.barrier()


# --- beginning and ending ------------------------------------------------------------------------


@scenario()
def destroyed_twice(rank: Rank) -> None:
    begin(rank)
    dist.destroy_process_group()
    caught(rank, dist.destroy_process_group, "twice")
    caught(rank, lambda: dist.all_reduce(torch.ones(3)), "later")
    rank.report(initialized=dist.is_initialized())


@scenario()
def begun_again_and_again(rank: Rank) -> None:
    """In one process, by every way to meet."""
    ways: list[dict[str, Any]] = []
    for i in range(3):
        ways.append({"init_method": f"file://{rank.folder / f'store{i}'}"})
    port = _free_port(rank)
    ways.append({"init_method": f"tcp://127.0.0.1:{port}"})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port(rank)))
    ways.append({"init_method": "env://"})
    ways.append({"init_method": "env://"})
    ways.append({"init_method": None, "store": dist.FileStore(str(rank.folder / "own"), rank.size)})
    for number, way in enumerate(ways):
        begin(rank, **way)
        t = torch.full((3,), float(rank.rank))
        dist.all_reduce(t)
        group = dist.new_group()
        dist.all_reduce(t, group=group)
        rank.report(**{f"sum {number}": t.tolist()})
        dist.destroy_process_group()
    # One rank alone, in a store in memory.
    dist.init_process_group("pycomm", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    rank.report(done=True)


def _free_port(rank: Rank) -> int:
    """One that rank 0 found; the others read it in a file."""
    import socket

    number = len(list(rank.folder.glob(f"port*-{rank.rank}")))
    place = rank.folder / f"port{number}"
    (rank.folder / f"port{number}-{rank.rank}").touch()
    if rank.rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        place.with_suffix(".part").write_text(str(port))
        place.with_suffix(".part").rename(place)
    while not place.exists():
        time.sleep(0.01)
    return int(place.read_text())


@scenario()
def begun_twice(rank: Rank) -> None:
    begin(rank)
    caught(rank, lambda: begin(rank))
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def destroyed_with_pending_work(rank: Rank) -> None:
    begin(rank)
    works = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(5)]
    unanswered = dist.irecv(torch.ones(3), 1 - rank.rank)
    dist.destroy_process_group()
    caught(rank, lambda: wait_for(*works), "reductions")
    caught(rank, unanswered.wait, "recv")
    rank.report(destroyed=True)


@scenario(size=3)
def subgroup_destroyed_while_others_go_on(rank: Rank) -> None:
    begin(rank)
    pair = dist.new_group([0, 1])
    if rank.rank < 2:
        dist.all_reduce(torch.ones(3), group=pair)
    if rank.rank == 0:
        dist.destroy_process_group(pair)
    if rank.rank == 1:
        work = dist.all_reduce(torch.ones(3), group=pair, async_op=True)  # nobody will answer
        del work
    t = torch.ones(3)
    for _ in range(3):
        dist.all_reduce(t)
    rank.report(sum=t.tolist())
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def never_destroyed(rank: Rank) -> None:
    begin(rank)
    group = dist.new_group()
    dist.all_reduce(torch.ones(3), group=group)
    _backward(rank)


@scenario()
def one_goes_early(rank: Rank) -> None:
    """It has nothing more to do; the other computes on for a while, by itself."""
    begin(rank)
    dist.all_reduce(torch.ones(3))
    if rank.rank == 0:
        time.sleep(3)


@scenario()
def one_destroys_early(rank: Rank) -> None:
    begin(rank)
    if rank.rank == 1:
        time.sleep(3)
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def one_destroys_much_too_early(rank: Rank) -> None:
    """Later than the timeout of a call: leaving is none."""
    begin(rank, timedelta(seconds=1))
    if rank.rank == 1:
        time.sleep(3)
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def one_destroys_while_the_other_calls(rank: Rank) -> None:
    begin(rank)
    if rank.rank == 0:
        caught(rank, lambda: dist.all_reduce(torch.ones(3)))
    caught(rank, dist.destroy_process_group, "destroy")


@scenario(size=3)
def error_on_a_subgroup_not_caught(rank: Rank) -> None:
    """The rank that is not in it waits on the default group."""
    begin(rank)
    pair = dist.new_group([0, 1])
    if rank.rank < 2:
        with reporting(rank):
            dist.all_reduce(torch.ones(3 + rank.rank), group=pair)
    with reporting(rank):
        dist.all_reduce(torch.ones(3))


@scenario()
def error_caught_and_destroyed(rank: Rank) -> None:
    """What trainers do: try ... finally destroy_process_group()."""
    begin(rank)
    try:
        with reporting(rank):
            dist.all_reduce(torch.ones(3 + rank.rank))
    finally:
        dist.destroy_process_group()
        rank.report(destroyed=True)


@scenario()
def one_raises_and_destroys(rank: Rank) -> None:
    """``finally: destroy_process_group()`` on the rank that fails, while the other waits for it."""
    begin(rank)
    try:
        with reporting(rank):
            if rank.rank == 0:
                time.sleep(0.3)
                raise ValueError("of the user's own")
            dist.all_reduce(torch.ones(3))
    finally:
        with reporting(rank, "destroy"):
            dist.destroy_process_group()


@scenario()
def aborted(rank: Rank) -> None:
    begin(rank)
    if rank.rank == 0:
        time.sleep(0.5)  # the other one waits in a call
        if hasattr(dist.ProcessGroup, "abort"):
            dist.distributed_c10d._abort_process_group()
        else:  # PyTorch 2.6, which asks groups of NCCL alone
            dist.group.WORLD.abort()
    else:
        caught(rank, lambda: dist.all_reduce(torch.ones(3)))
    rank.report(done=True)


# --- forks ---------------------------------------------------------------------------------------


class Asking(torch.utils.data.Dataset[int]):
    """Its items are computed in workers; one tries to communicate."""

    def __init__(self, communicates: bool) -> None:
        self._communicates = communicates

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if self._communicates and index == 5:
            dist.all_reduce(torch.ones(3))
        return index + dist.get_rank() - dist.get_rank()


@scenario()
def data_loader_workers(rank: Rank) -> None:
    begin(rank)
    model = _ddp(rank)
    loader = torch.utils.data.DataLoader(Asking(False), num_workers=2)
    for _ in range(2):
        for _ in loader:
            model(torch.ones(2, 30)).sum().backward()
    bad = torch.utils.data.DataLoader(Asking(True), num_workers=2)
    caught(rank, lambda: list(bad))
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def forked_by_hand(rank: Rank) -> None:
    begin(rank)
    work = dist.all_reduce(torch.ones(3), async_op=True)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(3)),
        "async": lambda: dist.all_reduce(torch.ones(3), async_op=True).wait(),
        "barrier": dist.barrier,
        "send": lambda: dist.send(torch.ones(3), 1 - rank.rank),
        "irecv": lambda: dist.irecv(torch.ones(3), 1 - rank.rank).wait(),
    }
    child = os.fork()
    if child == 0:
        for name, call in calls.items():
            caught(rank, call, name)
        caught(rank, dist.destroy_process_group, "destroy")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    rank.report(child=os.waitstatus_to_exitcode(status))
    work.wait()
    dist.all_reduce(torch.ones(3))
    # A child that ends as Python does takes nothing of ours with it.
    child = os.fork()
    if child == 0:
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    rank.report(second_child=os.waitstatus_to_exitcode(status))
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()
    rank.report(destroyed=True)


# --- with pycomm's own calls, with gloo ----------------------------------------------------------


@scenario()
def pycomm_joined_before(rank: Rank) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port(rank)))
    pycomm.init()
    begin(rank)
    _mixed(rank)
    dist.destroy_process_group()
    t = torch.ones(3)
    pycomm.all_reduce_(t)  # init()'s job goes on
    rank.report(after=t.tolist())
    pycomm.shutdown()


@scenario()
def pycomm_joined_after(rank: Rank) -> None:
    begin(rank)
    pycomm.init()
    _mixed(rank)
    dist.destroy_process_group()
    rank.report(after=pycomm.is_initialized())


def _mixed(rank: Rank) -> None:
    t = torch.full((3,), float(rank.rank + 1))
    dist.all_reduce(t)
    pycomm.all_reduce_(t)
    work = dist.all_reduce(t, async_op=True)
    work.wait()
    pycomm.all_reduce_(t)
    rank.report(sum=t.tolist())


@scenario()
def on_some_ranks_joined_before(rank: Rank) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    if rank.rank == 0:
        pycomm.init()
    with reporting(rank):
        begin(rank)


@scenario(size=3)
def group_of_pycomm_in_a_world_of_gloo(rank: Rank) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rank.folder / 'store'}",
        rank=rank.rank,
        world_size=rank.size,
        timeout=LONG,
    )
    every = dist.new_group(backend="pycomm")
    pair = dist.new_group([0, 2], backend="pycomm")
    t = torch.ones(3)
    dist.all_reduce(t, group=every)
    if rank.rank != 1:
        dist.all_reduce(t, group=pair)
        dist.destroy_process_group(pair)
    dist.all_reduce(t)
    rank.report(sum=t.tolist())
    dist.destroy_process_group()
    rank.report(destroyed=True)


# --- futures, threads, the keyboard, the profiler ------------------------------------------------


@scenario()
def callbacks_that_wait(rank: Rank) -> None:
    """A future's callback waits for another operation, as PowerSGD's hook does."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power

    begin(rank)

    def again(depth: int) -> Callable[[Any], Any]:
        def callback(future: Any) -> Any:
            t = future.value()[0]
            if depth == 0:
                return t
            work = dist.all_reduce(t, async_op=True)
            return work.get_future().then(again(depth - 1)).wait()

        return callback

    works = [dist.all_reduce(torch.ones(3), async_op=True) for _ in range(4)]
    results = [work.get_future().then(again(3)).wait() for work in works]
    rank.report(sums=[result.tolist() for result in results])
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    state = power.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    model.register_comm_hook(state, power.powerSGD_hook)
    for _ in range(4):
        model(torch.ones(2, 64)).sum().backward()
    rank.report(grad=model.module[0].weight.grad.sum().item())
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def interrupted(rank: Rank) -> None:
    """Ctrl-C while one waits."""
    begin(rank)
    if rank.rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with reporting(rank):
            dist.recv(torch.ones(3), 1)
    with reporting(rank):
        dist.barrier()


@scenario()
def interrupted_while_waiting_for_work(rank: Rank) -> None:
    begin(rank)
    if rank.rank == 0:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with reporting(rank):
            dist.all_reduce(torch.ones(3), async_op=True).wait()
    with reporting(rank):
        dist.recv(torch.ones(3), 0)


@scenario()
def threads_on_groups_of_their_own(rank: Rank) -> None:
    begin(rank)
    groups = [dist.new_group() for _ in range(3)]
    sums: dict[int, float] = {}

    def work(number: int) -> None:
        total = 0.0
        for i in range(50):
            t = torch.full((10,), float(number))
            pending = dist.all_reduce(t, group=groups[number], async_op=bool(i % 2))
            if pending is not None:
                pending.wait()
            total += t[0].item()
        sums[number] = total

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rank.report(sums=[sums[number] for number in range(3)])
    dist.destroy_process_group()
    rank.report(destroyed=True)


@scenario()
def profiled(rank: Rank) -> None:
    begin(rank)
    peer = 1 - rank.rank
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        dist.all_reduce(torch.ones(3))
        dist.all_reduce(torch.ones(3), async_op=True).wait()
        dist.broadcast(torch.ones(3), 0)
        dist.all_gather([torch.ones(3)] * 2, torch.ones(3))
        dist.all_gather_into_tensor(torch.ones(6), torch.ones(3))
        dist.reduce_scatter_tensor(torch.ones(3), torch.ones(6))
        dist.all_to_all_single(torch.ones(4), torch.ones(4))
        dist.reduce(torch.ones(3), 0)
        dist.gather(torch.ones(3), [torch.ones(3)] * 2 if rank.rank == 0 else None)
        dist.scatter(torch.ones(3), [torch.ones(3)] * 2 if rank.rank == 0 else None)
        dist.barrier()
        sent = dist.isend(torch.ones(3), peer)
        dist.recv(torch.ones(3), peer)
        sent.wait()
        _backward(rank)
    counts: dict[str, int] = {}
    for event in profiler.events():
        if event.name.startswith("pycomm:"):
            counts[event.name] = counts.get(event.name, 0) + 1
    rank.report(counts=counts)
    dist.destroy_process_group()


@scenario()
def debug_level_detail(rank: Rank) -> None:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    begin(rank)
    group = dist.new_group()
    t = torch.ones(3)
    dist.all_reduce(t)
    dist.all_reduce(t, group=group)
    _backward(rank)
    rank.report(sum=t.tolist())
    caught(rank, lambda: dist.all_reduce(torch.ones(3 + rank.rank), group=group))
    dist.destroy_process_group()
    rank.report(destroyed=True)


if __name__ == "__main__":
    chosen = sys.argv[2:]
    last = run_all(
        {n: s for n, s in SCENARIOS.items() if not chosen or n in chosen}, Path(sys.argv[1])
    )
    if last is not None:
        last()
