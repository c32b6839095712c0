"""What a checkpoint says about itself, beside tensors and values: kinds and optimizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pycomm.errors import InvalidArgumentError

NAME = "pycomm"
"""Of the value that holds it."""
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ParameterRecord:
    """One parameter of an optimizer."""

    names: list[str]  # all of them, if it is shared
    param_group: int
    order: tuple[int, int]  # stage of the pipeline, position in its group there


@dataclasses.dataclass(frozen=True)
class GroupRecord:
    """One param group of an optimizer, on this rank."""

    is_empty: bool
    options: dict[str, Any]


@dataclasses.dataclass
class OptimizerRecord:
    """One optimizer, as far as a rank has it."""

    class_name: str
    parameters: list[ParameterRecord]
    groups: list[GroupRecord]
    ties: list[list[str]]  # names of one parameter, on this rank or not


Record = dict[str, Any]
"""``{"format", "kinds": {thing: kind}, "optimizers": {thing: {"class", "parameters": [...],
"groups": [options, ...]}}}``; options are here for groups without parameters, others have theirs by
the names of these."""


def merged(kinds: Mapping[str, str], of_ranks: Sequence[Mapping[str, OptimizerRecord]]) -> Record:
    """The record of the whole checkpoint.

    Raises:
        InvalidArgumentError: ranks have different optimizers.
    """
    return {
        "format": FORMAT,
        "kinds": dict(kinds),
        "optimizers": {
            name: _optimizer(name, [of_rank[name] for of_rank in of_ranks])
            for name, kind in kinds.items()
            if kind == "optimizer"
        },
    }


def _optimizer(name: str, parts: Sequence[OptimizerRecord]) -> dict[str, Any]:
    class_name = parts[0].class_name
    known: dict[str, ParameterRecord] = {}
    for rank, part in enumerate(parts):
        if part.class_name != class_name:
            raise InvalidArgumentError(
                f"'{name}' is {class_name} on rank 0 and {part.class_name} on rank {rank}.\n"
                "  Give all ranks the same optimizer."
            )
        for parameter in part.parameters:
            for its_name in parameter.names:
                other = known.setdefault(its_name, parameter)
                if other.param_group != parameter.param_group:
                    raise InvalidArgumentError(
                        f"'{name}' has parameter '{its_name}' in param_groups "
                        f"[{other.param_group}] and, on rank {rank}, in [{parameter.param_group}]."
                        "\n  Build the same param groups on every rank."
                    )
    # Names of one parameter, be it that a rank has it under both or that stages share it.
    alike: dict[str, list[str]] = {its_name: [its_name] for its_name in known}
    ties = [tie for part in parts for tie in part.ties]
    ties += [parameter.names for part in parts for parameter in part.parameters]
    for tie in ties:
        names = [one for its_name in tie if its_name in alike for one in alike[its_name]]
        for its_name in names:
            alike[its_name] = names
    by_order = sorted(
        known, key=lambda its_name: (known[its_name].param_group, *known[its_name].order)
    )
    parameters, done = [], set[str]()
    for its_name in by_order:
        if its_name not in done:
            names = sorted(set(alike[its_name]), key=by_order.index)
            done.update(names)
            parameters.append({"names": names, "param_group": known[its_name].param_group})
    return {"class": class_name, "parameters": parameters, "groups": _groups(parts)}


def _groups(parts: Sequence[OptimizerRecord]) -> list[dict[str, Any]]:
    """Options of each param group: those where it has parameters, else the lowest rank's."""
    found: list[GroupRecord] = []
    for part in parts:
        for number, group in enumerate(part.groups):
            if number == len(found):
                found.append(group)
            elif found[number].is_empty and not group.is_empty:
                found[number] = group
    return [group.options for group in found]
