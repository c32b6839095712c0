"""Parameters that several stages share, such as an embedding that is the output layer, too."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pycomm._core import Group
from pycomm.collectives import all_reduce_, broadcast_
from pycomm.errors import InvalidArgumentError, MismatchError
from pycomm.objects import all_gather_object, raise_together

# A parameter: the stage, and its name there.
_Name = tuple[int, str]


class Ties:
    """Keeps the copies of a shared parameter equal: each step their gradients are summed.

    Args:
        pieces: of every stage, as far as this rank was given them.
        here: this rank's.
        named: names of the copies, "stage.name", where a rank lacks other ranks' stages.
        group: the pipeline's. Collective.

    Raises:
        InvalidArgumentError: a name that is not there, copies of two shapes; on every rank.
        MismatchError: ranks found different ties.
    """

    def __init__(
        self,
        pieces: Mapping[int, nn.Module | None],
        here: Mapping[int, nn.Module],
        named: Sequence[Sequence[str]],
        rank_of: Callable[[int], int],
        group: Group,
    ) -> None:
        self._shared: list[tuple[str, Tensor, Group]] = []
        self._twins: set[int] = set()  # copies whose other one counts, by id
        mistake, ties, mine = None, [], []
        try:
            ties = [*_found(pieces), *(tuple(map(_parsed, tie)) for tie in named)]
            mine = [_own(tie, here) for tie in ties]
        except InvalidArgumentError as error:
            mistake = error
        raise_together("Pipeline", mistake, group)
        self.names: list[tuple[_Name, ...]] = ties
        """Of each shared parameter: stages, and its names there."""
        for rank, theirs in enumerate(all_gather_object(ties, group=group)):
            if theirs != ties:
                raise MismatchError(
                    f"Pipeline: stages share {_listed(ties)} on rank {group.rank} and "
                    f"{_listed(theirs)} on rank {rank}.\n  Where ranks are not given all stages, "
                    "pass the same ties= on all of them.",
                    group_usable=True,
                )
        for tie, param in zip(ties, mine, strict=True):
            ranks = sorted({rank_of(stage) for stage, _ in tie})
            if len(ranks) == 1:
                continue  # one parameter of one rank, whose gradient autograd sums
            owners = group.new_group(ranks)
            if owners is None:
                continue
            assert param is not None
            broadcast_(param.data, 0, group=owners)
            name = " = ".join(f"{stage}.{its_name}" for stage, its_name in tie)
            self._shared.append((name, param, owners))
            if owners.rank > 0:
                self._twins.add(id(param))

    def counts(self, param: Tensor) -> bool:
        """Whether a parameter is to be counted here, and not on another rank that shares it."""
        return id(param) not in self._twins

    def check_fresh(self, call: str) -> None:
        """Refuse gradients of an earlier step, which would be summed twice.

        Raises:
            InvalidArgumentError: there are some.
        """
        for name, param, owners in self._shared:
            if param.grad is not None and bool(param.grad.any()):
                raise InvalidArgumentError(
                    f"{call} on rank {owners.rank}: parameter {name}, shared between stages, has "
                    "a gradient from an earlier step.\n  Call optimizer.zero_grad() before each "
                    "step; to accumulate, use more micro_batches."
                )

    def sum_gradients(self) -> None:
        """Let all copies have the sum of their gradients."""
        for _, param, owners in self._shared:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            all_reduce_(param.grad, group=owners)


def _found(pieces: Mapping[int, nn.Module | None]) -> list[tuple[_Name, ...]]:
    """Parameters that are one object in several stages."""
    places: dict[int, list[_Name]] = collections.defaultdict(list)
    for stage, piece in pieces.items():
        if piece is not None:
            for name, param in piece.named_parameters():
                places[id(param)].append((stage, name))
    return [tuple(names) for names in places.values() if len(names) > 1]


def _parsed(name: str) -> _Name:
    stage, _, its_name = name.partition(".")
    if not stage.isdigit() or not its_name:
        raise InvalidArgumentError(
            f"ties has {name!r}. Pass the stage and the parameter's name in it: "
            '"0.embedding.weight".'
        )
    return int(stage), its_name


def _own(tie: Sequence[_Name], here: Mapping[int, nn.Module]) -> Tensor | None:
    """This rank's copy of a shared parameter, if it has one."""
    own: dict[int, Tensor] = {}
    for stage, name in tie:
        if stage not in here:
            continue
        param = dict(here[stage].named_parameters()).get(name)
        if param is None:
            raise InvalidArgumentError(f"ties names {name!r} in stage {stage}, which has no such.")
        own[id(param)] = param
    if len(own) > 1:
        raise InvalidArgumentError(
            f"ties names two parameters of one rank: {_listed([tie])}.\n"
            "  Let both stages have the same nn.Parameter."
        )
    return next(iter(own.values()), None)


def _listed(ties: Sequence[Sequence[_Name]]) -> str:
    texts = [" = ".join(f"{stage}.{name}" for stage, name in tie) for tie in ties]
    return ", ".join(texts) or "nothing"
