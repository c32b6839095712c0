"""Faults after which a process is gone."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

import torch
from torch import Tensor, nn

import pycomm
from faults.fault import ENDED, Part, compute, fault
from faults.models import optimizer_of, pipeline_with, weights


def end_myself(part: Part) -> NoReturn:
    part.begins()
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still there")


@fault("`kill -9` of a rank", near="PeerLostError", lost=True, hosts=(1, 2))
def kill_in_a_collective(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        end_myself(part)
    pycomm.barrier()


@fault("`kill -9` of a rank", others="computing", near="PeerLostError", lost=True)
def kill_while_computing(part: Part) -> None:
    if part.is_victim:
        end_myself(part)
    compute(1.0)
    part.calls()
    pycomm.barrier()


@fault("`kill -9` of a rank", others="in `backward`", near="PeerLostError", lost=True)
def kill_in_backward(part: Part) -> None:
    params = weights()
    optimizer = optimizer_of(params)
    for step in range(4):
        optimizer.zero_grad()
        loss = torch.stack([param.sum() for param in params.values()]).sum()
        if step == 3 and part.is_victim:
            time.sleep(0.5)
            params["w1"].register_hook(lambda gradient: end_myself(part))
        loss.backward()
        optimizer.step()


class _Killed(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.5)
        end_myself(self.part)


@fault("`kill -9` of a rank", others="in a pipeline's receive", near="PeerLostError", lost=True)
def kill_in_a_pipeline(part: Part) -> None:
    pipeline, x = pipeline_with(_Killed(part) if part.is_victim else nn.Tanh())
    pipeline.step(x, x)


@fault("a host is powered off", far="PeerLostError", lost=True, hosts=(2,), outside="power_off")
def power_off(part: Part) -> None:
    _call_for_ever(part)


@fault("the cable of a host is cut", all="PeerLostError", lost=True, hosts=(2,), outside="cut")
def cut(part: Part) -> None:
    _call_for_ever(part)


@fault(
    "a host is powered off, plain `mpirun`",
    far="PeerLostError",
    lost=True,
    hosts=(2,),
    outside="power_off",
    ulfm=False,
)
def power_off_without_ulfm(part: Part) -> None:
    _call_for_ever(part)


@fault(
    "the cable of a host is cut, plain `mpirun`",
    all="PeerLostError",
    lost=True,
    hosts=(2,),
    outside="cut",
    ulfm=False,
)
def cut_without_ulfm(part: Part) -> None:
    _call_for_ever(part)


def _call_for_ever(part: Part) -> None:
    pycomm.barrier()
    time.sleep(1.5)  # everybody was heard
    part.is_ready()
    while True:
        pycomm.barrier()
        time.sleep(0.01)


@fault(
    "an exception nobody catches",
    victim="ValueError",
    near="PeerLostError",
    lost=True,
    ends_job=True,
    hosts=(1, 2),
)
def uncaught(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        raise ValueError("bad batch")
    pycomm.barrier()


@fault(
    "an exception nobody catches",
    others="computing",
    victim="ValueError",
    near="PeerLostError",
    lost=True,
    ends_job=True,
)
def uncaught_while_computing(part: Part) -> None:
    if part.is_victim:
        part.begins()
        raise ValueError("bad batch")
    compute(1.0)
    part.calls()
    pycomm.barrier()


@fault(
    "an exception nobody catches",
    others="computing for long",
    victim="ValueError",
    near=ENDED,
    lost=True,
    ends_job=True,
    hosts=(2,),
)
def uncaught_while_computing_long(part: Part) -> None:
    if part.is_victim:
        part.begins()
        raise ValueError("bad batch")
    compute(30.0)


@fault(
    "Ctrl-C on a rank", victim="KeyboardInterrupt", near="PeerLostError", lost=True, ends_job=True
)
def interrupted(part: Part) -> None:
    if part.is_victim:
        time.sleep(0.5)
        part.begins()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    pycomm.barrier()


@fault(
    "a rank ends before it starts MPI",
    others="in `init()`",
    victim="SystemExit",
    near=ENDED,
    lost=True,
    ends_job=True,
    early=True,
    says=r"init on rank (\d+): MPI did not start.*",
)
def ends_before_mpi(part: Part) -> None:
    if part.is_victim:
        part.begins()
        sys.exit(3)
    pycomm.init()


@fault(
    "a rank ends before `init()`, after MPI's",
    others="in `init()`",
    near="CommTimeoutError",
    lost=True,
    ends_job=True,
    early=True,
)
def ends_before_init(part: Part) -> None:
    from mpi4py import MPI

    MPI.COMM_WORLD.Barrier()
    if part.is_victim:
        part.begins()
        os._exit(3)
    pycomm.init()
