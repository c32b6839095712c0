"""Faults in which ranks wait for each other: somebody does not come, or all wait in a circle."""

from __future__ import annotations

import os
import signal
import threading
import time

import torch
from torch import Tensor, nn

import pycomm
from faults.fault import Part, fault
from faults.models import pipeline_with
from pycomm.runtime import world_group


@fault("SIGSTOP of a rank", all="CommTimeoutError")
def stop(part: Part) -> None:
    pids = pycomm.all_gather_object(os.getpid())
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.1)
    elif part.rank == 2:  # its host's: wakes it when all have seen what they see
        part.afterwards += [lambda: time.sleep(1), lambda: os.kill(pids[-1], signal.SIGCONT)]
    pycomm.barrier()


@fault("SIGSTOP of a rank", near="CommTimeoutError", lost=True, hosts=(2,))
def stop_for_good(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        os.kill(os.getpid(), signal.SIGSTOP)
    pycomm.barrier()


@fault("a rank hangs in the user's code", all="CommTimeoutError")
def hang(part: Part) -> None:
    if part.is_victim:
        part.begins()
        time.sleep(part.timeout_s + 2)
    pycomm.barrier()


@fault("an uneven loop: a rank makes a call less, and waits in another group", all="MismatchError")
def fewer_calls_then_another_group(part: Part) -> None:
    other = world_group().duplicate()
    pycomm.barrier()
    if part.is_victim:
        part.begins()
        part.again = lambda: pycomm.barrier(group=other)
        pycomm.barrier(group=other)
    pycomm.barrier()


@fault(
    "an uneven loop: a rank makes a call less, and leaves by `shutdown()`",
    all="MismatchError",
    hosts=(1, 2),
)
def fewer_calls_then_shutdown(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        part.again = None
        pycomm.shutdown()
        return
    pycomm.barrier()


@fault("`shutdown()` in the `finally:` of an exception", all="MismatchError")
def shutdown_in_finally(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        part.again = None
        try:
            raise ValueError("bad batch")
        finally:
            pycomm.shutdown()
    pycomm.barrier()


@fault("Ctrl-C on a rank in a call, caught", victim="KeyboardInterrupt", near="PeerLostError")
def interrupted_in_a_call(part: Part) -> None:
    if part.is_victim:

        def interrupt() -> None:
            part.begins()
            os.kill(os.getpid(), signal.SIGINT)

        threading.Timer(0.5, interrupt).start()
        pycomm.recv(torch.empty(1), 0)
    pycomm.barrier()


class _Failing(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.5)
        self.part.begins()
        raise ValueError("bad batch")


@fault(
    "an exception in a pipeline's stage",
    others="in a pipeline's receive",
    victim="StageError",
    near="PeerLostError",
)
def stage_raises(part: Part) -> None:
    pipeline, x = pipeline_with(_Failing(part) if part.is_victim else nn.Tanh())
    part.again = lambda: pipeline.step(x, x)
    pipeline.step(x, x)


@fault("a `recv` that nobody sends for", all="CommTimeoutError")
def recv_without_send(part: Part) -> None:
    if part.is_victim:
        part.begins()
        pycomm.recv(torch.empty(1), 0)
    pycomm.barrier()


@fault(
    "all ranks `send` to the next before they `recv`", others="in `send`", all="CommTimeoutError"
)
def all_send_first(part: Part) -> None:
    much = torch.ones(1 << 22)
    if part.is_victim:
        part.begins()
    pycomm.send(much, (part.rank + 1) % pycomm.size())
    pycomm.recv(much, (part.rank - 1) % pycomm.size())


@fault("two groups called in opposite orders", all="MismatchError", hosts=(1, 2))
def opposite_orders(part: Part) -> None:
    groups = [world_group().duplicate() for _ in range(2)]
    if part.is_victim:
        part.begins()
        groups.reverse()
    part.again = lambda: pycomm.barrier(group=groups[0])
    for group in groups:
        pycomm.barrier(group=group)


@fault("`Group.abort` on a rank", victim="", near="PeerLostError", hosts=(1, 2))
def abort(part: Part) -> None:
    group = world_group().duplicate()
    part.again = lambda: pycomm.barrier(group=group)
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        group.abort("rank 3 has had enough")
    else:
        pycomm.barrier(group=group)
