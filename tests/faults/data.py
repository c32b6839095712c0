"""Faults in what ranks pass: after all of these the group is usable."""

from __future__ import annotations

import math

import torch

import pycomm
from faults.fault import Part, fault
from faults.models import optimizer_of, weights


@fault("an invalid argument on a rank", victim="InvalidArgumentError", near="", usable=True)
def invalid_argument(part: Part) -> None:
    if part.is_victim:
        part.afterwards.append(lambda: pycomm.all_reduce(torch.ones(3)))
        part.begins()
        pycomm.all_reduce(torch.ones(3), "SUM")  # type: ignore[call-overload]
    pycomm.all_reduce(torch.ones(3))


@fault(
    'NaN in a gradient, `check_finite="error"`',
    others="in `backward`",
    all="NonFiniteError",
    usable=True,
)
def nan_is_an_error(part: Part) -> None:
    _nan(part, "error")


@fault('NaN in a gradient, `check_finite="skip"`', others="in `backward`", usable=True)
def nan_is_skipped(part: Part) -> None:
    _nan(part, "skip")


def _nan(part: Part, check_finite: str) -> None:
    params = weights()
    optimizer = optimizer_of(params, check_finite=check_finite)

    def step(factor: float = 1.0) -> None:
        optimizer.zero_grad()
        (torch.stack([param.sum() for param in params.values()]).sum() * factor).backward()
        optimizer.step()

    def step_again() -> None:
        step()
        assert all(param.isfinite().all() for param in params.values())

    part.again = step_again
    step()
    if part.is_victim:
        part.begins()
    step(math.nan if part.is_victim else 1.0)
    assert optimizer.skipped_steps == 1


@fault(
    'ranks have drifted apart, `verify="checksum"`',
    others="in `step()`",
    all="DriftError",
    usable=True,
)
def drift(part: Part) -> None:
    params = weights()
    optimizer = optimizer_of(params, verify="checksum", verify_every=1)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack([param.sum() for param in params.values()]).sum().backward()
        optimizer.step()

    def mend() -> None:
        pycomm.broadcast_parameters(params)
        step()

    part.again = mend
    step()
    if part.is_victim:
        part.begins()
        with torch.no_grad():
            params["w2"][5] += 1
    step()
