"""From what the user passes to things, alike on all ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pycomm._core import Group
from pycomm.checkpoint import folder, record
from pycomm.checkpoint.contents import SEPARATOR, listed, shown
from pycomm.checkpoint.host import host
from pycomm.checkpoint.module import ModuleThing, table_of
from pycomm.checkpoint.optimizer import OptimizerThing
from pycomm.checkpoint.plain import ObjectThing, ValueThing
from pycomm.checkpoint.thing import Thing
from pycomm.checkpoint.together import together
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.objects import all_gather_object
from pycomm.pipeline import Pipeline


def agreed(
    call: str, path: str | os.PathLike[str], state: Mapping[str, Any], group: Group
) -> tuple[Path, list[Thing]]:
    """Where the checkpoint is and what each name stands for, alike on all ranks. Collective.

    Raises:
        InvalidArgumentError: one cannot use what it was given, or some who have a part of something
            do not take part; on every rank.
        MismatchError: ranks passed different paths or names; the group stays usable.
    """
    place = together(call, group, lambda: folder.absolute(path))
    things = together(call, group, lambda: things_of(state))
    together(call, group, lambda: check_within(things, group))
    agree(call, place, things, group)
    return place, things


def things_of(state: Mapping[str, Any]) -> list[Thing]:
    """What each name stands for.

    Raises:
        InvalidArgumentError: a name that cannot be one, or something without a state.
    """
    if not isinstance(state, Mapping) or not state:
        found = "empty" if isinstance(state, Mapping) else shown(state)
        raise InvalidArgumentError(
            f"state is {found}.\n  Pass path first, and then names with what to save: "
            '{"model": model, "optimizer": optimizer, "epoch": epoch}.'
        )
    for name in state:
        if not isinstance(name, str) or not name or SEPARATOR in name or name == record.NAME:
            raise InvalidArgumentError(
                f"state has the name {shown(name)}.\n  Use names of one word, without dots, other "
                f"than {record.NAME!r}."
            )
    modules = [
        ModuleThing(name, thing)
        for name, thing in state.items()
        if isinstance(thing, (nn.Module, Pipeline))
    ]
    made: dict[str, Thing] = {module.name: module for module in modules}
    table, ties = table_of(modules), {module.name: module.ties for module in modules}
    for name, thing in state.items():
        if isinstance(thing, Optimizer):
            made[name] = OptimizerThing(name, thing, table, ties)
        elif name in made:
            continue
        elif hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict"):
            made[name] = ObjectThing(name, thing)
        else:
            made[name] = ValueThing(name, thing)
    return [made[name] for name in state]


def check_within(things: list[Thing], group: Group) -> None:
    """See to it that all who have a part of something take part.

    Raises:
        InvalidArgumentError: some do not.
    """
    here = set(group.ranks)
    for thing in things:
        for how, its_group in thing.spreads:
            if not here.issuperset(its_group.ranks):
                raise InvalidArgumentError(
                    f"'{thing.name}' {how} ranks {its_group.ranks}, and the group of this call is "
                    f"ranks {group.ranks}.\n  Let all ranks that share the model make the call, "
                    "with a group that has all of them or without group=, which is the world."
                )


def agree(call: str, path: Path, things: list[Thing], group: Group) -> None:
    """See to it that all ranks mean the same, and how parameters are called. Collective.

    Raises:
        MismatchError: ranks passed different paths or names; the group stays usable.
    """
    mine = {thing.name: thing.kind for thing in things}
    optimizers = [thing for thing in things if isinstance(thing, OptimizerThing)]
    modules = {optimizer.name: optimizer.modules() for optimizer in optimizers}
    everyones = all_gather_object((str(path), mine, modules, host()), group=group)
    first_path, first, _, first_host = everyones[0]
    for rank, (its_path, its_things, _, its_host) in enumerate(everyones):
        if its_path != first_path:
            raise MismatchError(
                f"{call} on rank {group.rank}: path is {first_path} on rank 0 ({first_host}) and "
                f"{its_path} on rank {rank} ({its_host}).\n  Pass the same on every rank; a "
                "relative one depends on the working directory.",
                group_usable=True,
            )
        if its_things != first:
            different = [
                f"'{name}' ({first.get(name, 'not there')} and {its_things.get(name, 'not there')})"
                for name in {**first, **its_things}
                if first.get(name) != its_things.get(name)
            ]
            raise MismatchError(
                f"{call} on rank {group.rank}: ranks 0 and {rank} pass different things: "
                f"{listed(different)}.\n  Pass the same names on every rank; a value that only one "
                "rank has goes to the others with broadcast_object.",
                group_usable=True,
            )
    for optimizer in optimizers:
        used = set().union(*(its_modules[optimizer.name] for _, _, its_modules, _ in everyones))
        optimizer.has_prefixes = len(used - {""}) > 1
