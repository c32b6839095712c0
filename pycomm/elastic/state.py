"""What all ranks have in common and go back to when one is lost."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pycomm.elastic.values import has_state, put, requires_gradients
from pycomm.errors import CommError, InvalidArgumentError
from pycomm.optimizer import DistributedOptimizer
from pycomm.pipeline import Pipeline
from pycomm.sharded_optimizer import ShardedOptimizer
from pycomm.shares import named_shares

RECORD = "elastic"
"""The name in a checkpoint of what ``run`` itself keeps there."""
OF_CHECKPOINTS = "pycomm"
"""``pycomm.checkpoint.record.NAME``, which takes half a second to import."""


class State:
    """Things by name, each an attribute: ``state.model``, ``state.epoch``.

    Make it before ``pycomm.elastic.run``, as for a new training: there rank 0's goes to all, or
    what is in ``folder``.

    Args:
        folder: where checkpoints go (``pycomm.checkpoint``), and where a job that is started again
            resumes from. On a file system that all ranks see; a relative one is below the working
            directory of now. None: a lost rank costs nothing, a lost job everything.
        disk_every: how many commits between two checkpoints. Besides, one is written before
            ``train`` is called first, if there is none, when the job is preempted and when it ends.
        things: the same names on every rank. Models, bare optimizers, schedulers, samplers and
            anything else with ``state_dict`` and ``load_state_dict``, of which the same object
            stays; or values (numbers, tensors, lists, dicts), which are set anew: tensors on the
            device of the one in their place. All are the same on every rank after a step, but for
            buffers that each replica has of its own.

    Raises:
        InvalidArgumentError: a thing of which each rank has a share, which would be lost with it,
            or that belongs to one world; a value with a tensor that requires gradients; a name that
            cannot be one.
    """

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] | None = None,
        disk_every: int = 100,
        **things: Any,
    ) -> None:
        if not isinstance(disk_every, int) or disk_every < 1:
            raise InvalidArgumentError(f"State: disk_every is {disk_every!r}. Pass at least 1.")
        if folder is not None and not isinstance(folder, (str, os.PathLike)):
            raise InvalidArgumentError(f"State: folder is {folder!r}. Pass a path, or None.")
        for name, thing in things.items():
            _check(name, thing)
        self.__dict__.update(
            folder=None if folder is None else Path(folder).absolute(),
            disk_every=disk_every,
            _names=tuple(things),
            _commit=None,
            **things,
        )

    def commit(self) -> None:
        """All ranks have come this far: from here they go on if one is lost. All ranks call it.

        Call it after ``optimizer.step()`` and what belongs to it, every few steps at least: what
        comes after the last commit is done again after a loss. It may leave ``train``, which
        ``run`` then calls again, if ranks come back, or end the process, if the job is preempted.

        Raises:
            CommError: outside of ``run``.
            PeerLostError, ...: as for ``all_reduce``; leave them to ``run``.

        Cost: one copy of everything to memory; two such copies are kept. One tiny all-reduce.
        """
        if self._commit is None:
            raise CommError("commit: outside of pycomm.elastic.run.\n  Call it in what run calls.")
        self._commit()

    def things(self) -> dict[str, Any]:
        """All of them, by name."""
        return {name: getattr(self, name) for name in self._names}

    def put(self, values: dict[str, Any]) -> None:
        """Make everything what it was when ``values`` were taken (``values.take``)."""
        self.__dict__.update(put(self.things(), values))

    def attach(self, commit: Callable[[], None] | None) -> None:
        """What ``commit()`` does from now on; None: nothing that could be done."""
        self.__dict__["_commit"] = commit

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise InvalidArgumentError(
                f"State has no {name!r}, so it would not be committed.\n"
                f"  Pass it to State(...), or keep it elsewhere. It has {', '.join(self._names)}."
            )
        _check(name, value)
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:  # for type checkers: things are attributes
        raise AttributeError(f"State has no {name!r}")


_RESERVED = {RECORD, OF_CHECKPOINTS, "folder", "disk_every", "commit", "things", "put", "attach"}


def _check(name: str, thing: object) -> None:
    if name in _RESERVED or name.startswith("_") or "." in name:  # of a checkpoint's names
        raise InvalidArgumentError(f"State: nothing in it can be named {name!r}. Rename it.")
    if isinstance(thing, DistributedOptimizer):
        raise InvalidArgumentError(
            f"State: '{name}' is a DistributedOptimizer, which belongs to the ranks it was made "
            "with.\n  Pass the bare optimizer, and wrap it in train()."
        )
    shared = isinstance(thing, (ShardedOptimizer, Pipeline)) or (
        isinstance(thing, nn.Module) and any(True for _ in named_shares(thing))
    )
    if shared:
        raise InvalidArgumentError(
            f"State: each rank has a share of '{name}' ({type(thing).__name__}), which would be "
            "lost with it.\n  Keep it in checkpoints (pycomm.checkpoint), which any number of "
            "ranks can resume from."
        )
    if not has_state(thing) and requires_gradients(thing):
        raise InvalidArgumentError(
            f"State: '{name}' is, or has in it, a tensor that requires gradients. It would be set "
            "anew, and no optimizer would know the new one.\n"
            "  Put it into a module (nn.ParameterDict), or pass tensor.detach()."
        )
    if isinstance(thing, type) or (isinstance(thing, Optimizer) and not thing.param_groups):
        raise InvalidArgumentError(f"State: '{name}' is {thing!r}. Pass an object of it.")
