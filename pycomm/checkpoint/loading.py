"""``load``: what a rank needs of a checkpoint, whoever wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pycomm._core import Group
from pycomm.checkpoint.contents import Wanted, joined, listed
from pycomm.checkpoint.host import host
from pycomm.checkpoint.saved import Saved
from pycomm.checkpoint.thing import Thing
from pycomm.checkpoint.things import agreed
from pycomm.checkpoint.together import naming, together
from pycomm.errors import InvalidArgumentError
from pycomm.objects import all_gather_object, gather_object
from pycomm.runtime import group_of


def load(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    partial: bool = False,
    group: Group | None = None,
) -> dict[str, Any]:
    """Restore what ``save`` wrote, on any number of ranks in any layout, to the same bits.

    ::

        step = pycomm.checkpoint.load("run/latest", {"model": pipeline, "optimizer": optimizer,
                                                     "scheduler": scheduler})["step"]

    Make model, optimizer and scheduler as for a new run; what they hold is overwritten. Names,
    shapes, dtypes and files are checked first, on every rank.

    Args:
        path: as for ``save``. Its ``.metadata`` is a pickle, which can run any code as it is
            loaded: load only what you trust. Values are loaded with ``weights_only=True``.
        state: as for ``save``: everything that is in the checkpoint, but for values.
        partial: whether the checkpoint may hold more than ``state`` names, such as an optimizer
            that an evaluation does not need.
        group: the ranks that share the state, the world if None; every one of them makes this call.
            All that have a part of a pipeline, of split layers or of a divided optimizer are in it.

    Returns:
        The values in the checkpoint, by name.

    Raises:
        InvalidArgumentError: on every rank, naming what is missing, unexpected, of another shape or
            dtype, damaged, cut off or not seen by a rank; the group stays usable, and nothing has
            been changed unless the text says that a file cannot be read, or that what is one tensor
            here differs in the checkpoint.
        MismatchError: ranks passed different paths or names; the group stays usable.
        PeerLostError, CommTimeoutError: a rank ended, or took longer than the deadline.

    An optimizer's param groups need not be those that were saved: each group takes the options that
    its parameters had. Two parameters that were saved with different options cannot be in one.
    A group without parameters on this rank takes the options of the saved group of its number; it
    keeps its own if the number of groups is another one.

    Cost: each rank reads the stored parts that its own overlap, once for their checksums and once,
    from the system's cache if they fit there, to where they belong. Memory: one such part.
    """
    call = "checkpoint.load"
    group = group_of(group, call)
    place, things = agreed(call, path, state, group)
    call = f"checkpoint.load({str(place)!r})"
    with naming(call, "What is being restored may be so in part; load it again."):
        saved = _open(call, Path(os.path.realpath(place)), group)
        together(call, group, lambda: _check_kinds(saved, things, partial))
        wanted = together(call, group, lambda: _wanted(saved, things))
        _check_names(call, saved, things, group)
        together(call, group, lambda: saved.check_files(wanted))
        values = together(call, group, lambda: saved.read(Wanted(values=wanted.values)))
        together(call, group, lambda: _check(things, values))
        together(call, group, lambda: saved.read(Wanted(tensors=wanted.tensors)))
        together(call, group, lambda: _install(things, values))
    return {name: values[name] for name, kind in saved.kinds.items() if kind == "value"}


def _open(call: str, path: Path, group: Group) -> Saved:
    """The checkpoint, if all ranks see the same one."""
    saved, mistake = None, None
    try:
        saved = Saved.open(path)
    except Exception as error:  # whatever it is, the other ranks are to hear of it
        mistake = error
    text = str(mistake) if isinstance(mistake, InvalidArgumentError) else repr(mistake)
    mine = (saved and saved.digest, text, host())
    everyones = all_gather_object(mine, group=group)
    first, text, first_host = everyones[0]
    for rank, (its_digest, its_text, its_host) in enumerate(everyones):
        if its_digest == first:
            continue
        if first is None or its_digest is None:
            problem = (
                f"{text if first is None else its_text}\n  That is rank "
                f"{0 if first is None else rank} on {first_host if first is None else its_host}; "
                f"rank {rank if first is None else 0} on "
                f"{its_host if first is None else first_host} finds a checkpoint."
            )
        else:
            problem = (
                f"rank 0 on {first_host} and rank {rank} on {its_host} find different checkpoints."
            )
        raise InvalidArgumentError(
            f"{call} on rank {group.rank}: {problem}\n  Pass a path on a file system that all "
            "ranks share, or copy the whole folder to every host."
        ) from mistake
    if saved is None:
        raise InvalidArgumentError(f"{call} on rank {group.rank}: {text}") from mistake
    return saved


def _check_kinds(saved: Saved, things: list[Thing], partial: bool) -> None:
    there = ", ".join(f"'{name}' ({kind})" for name, kind in saved.kinds.items())
    for thing in things:
        kind = saved.kinds.get(thing.name)
        if kind != thing.kind:
            what = "what was saved"
            if thing.kind == "value" and kind is not None:
                what = f"the {kind} itself, into which its state is put"
            problem = "is not in it" if kind is None else f"is of kind {kind} in it"
            raise InvalidArgumentError(
                f"'{thing.name}' ({thing.kind}) {problem}. The checkpoint has {there}.\n"
                f"  Pass {what}, under the same names."
            )
    asked = {thing.name for thing in things}
    left = [f"'{n}'" for n, kind in saved.kinds.items() if kind != "value" and n not in asked]
    if left and not partial:
        raise InvalidArgumentError(
            f"the checkpoint has {listed(left)}, which state does not name.\n"
            "  Pass it, too, or partial=True to leave it."
        )


def _wanted(saved: Saved, things: list[Thing]) -> Wanted:
    wanted = Wanted()
    for thing in things:
        wanted.add(thing.wanted(saved))
    asked = set(wanted.values)
    wanted.values += [n for n, kind in saved.kinds.items() if kind == "value" and n not in asked]
    return wanted


def _check(things: list[Thing], values: Mapping[str, Any]) -> None:
    for thing in things:
        thing.check(values)


def _install(things: list[Thing], values: Mapping[str, Any]) -> None:
    for thing in things:
        thing.install(values)


def _check_names(call: str, saved: Saved, things: list[Thing], group: Group) -> None:
    """Refuse a checkpoint with names that no rank has a use for."""
    claims = gather_object({thing.name: thing.claims(saved) for thing in things}, group=group)

    def check() -> None:
        assert claims is not None
        left: list[str] = []
        for thing in things:
            claimed = set().union(*(of_rank[thing.name] for of_rank in claims))
            left += [
                f"'{joined(thing.name, name)}'"
                for name in saved.names(thing.name)
                if name not in claimed
            ]
        if left:
            raise InvalidArgumentError(
                f"the checkpoint has {listed(left)}, which no rank has a place for.\n"
                "  Build the model as it was when it was saved, and let all its ranks take part; "
                "pycomm.checkpoint.read(path) shows what there is."
            )

    together(call, group, check, root=0)
