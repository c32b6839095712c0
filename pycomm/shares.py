"""Parameters of which each rank has a share: rows of one dimension of a whole tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pycomm._core import Group
from pycomm.arguments import refuse
from pycomm.collectives import all_gather_list
from pycomm.errors import InvalidArgumentError

_MARKS = "_pycomm_parts"
_SHARE = "a share of a split layer"


def bounds(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Where a rank's share of ``length`` rows begins and ends, as ``torch.tensor_split`` cuts.

    Shares differ by at most one row, and the longer ones come first.
    """
    each, rest = divmod(length, ranks)
    begin = rank * each + min(rank, rest)
    return begin, begin + each + (rank < rest)


@dataclasses.dataclass(frozen=True)
class Share:
    """What a rank's tensor is of the whole one: a run of rows of one dimension."""

    dim: int
    begin: int
    whole: tuple[int, ...]
    """The shape of the whole tensor."""
    group: Group
    """Whose ranks have the other shares, in the order of their ranks."""

    def __deepcopy__(self, memo: object) -> Share:
        return self


class SplitModule(nn.Module):
    """A module of which each rank of a group has a share.

    Subclasses call ``take_share`` for each parameter of their own that is split. All other
    parameters are the same on every rank of the group.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._home = HeldGroup(group)
        self._shares: dict[str, Share] = {}

    @property
    def group(self) -> Group:
        """The ranks that have the other shares."""
        return self._home.group

    def shares(self) -> dict[str, Share]:
        """Of this module's own parameters those that are split, by name."""
        return dict(self._shares)

    def take_share(self, name: str, whole: Tensor | None, dim: int) -> None:
        """Let this rank's share of ``whole`` along ``dim`` be the parameter ``name``."""
        if whole is None:
            self.register_parameter(name, None)
            return
        length = whole.shape[dim]
        begin, end = bounds(length, self.group.size, self.group.rank)
        own = whole.detach().narrow(dim, begin, end - begin)
        own = own.clone(memory_format=torch.contiguous_format)
        self.register_parameter(name, nn.Parameter(own, whole.requires_grad))
        self._shares[name] = Share(dim, begin, tuple(whole.shape), self.group)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark()  # a copy's parameters are new ones

    def _mark(self) -> None:
        for name in self._shares:
            mark_part(self.get_parameter(name), _SHARE, self.group)

    def whole(self, name: str) -> nn.Parameter | None:
        """The whole of a parameter of this module's own; on every rank. Collective."""
        param: nn.Parameter | None = getattr(self, name)
        if param is None:
            return None
        share = self._shares.get(name)
        value = joined(param, share) if share is not None else param.detach().clone()
        return nn.Parameter(value, param.requires_grad)


def joined(own: Tensor, share: Share) -> Tensor:
    """The whole tensor that the ranks' shares make up, on every rank. Collective."""
    return torch.cat(all_gather_list(own.detach(), group=share.group), share.dim)


def refuse_fewer(call: str, argument: str, length: int, group: Group) -> None:
    """Raise unless every rank gets a row of ``length`` rows."""
    if length < group.size:
        refuse(
            call,
            group,
            f"{argument} is {length}, and each of {group.size} ranks needs one at least.\n"
            "  Split over fewer ranks.",
        )


def mark_part(param: Tensor, what: str, group: Group) -> None:
    """Let a parameter say that each rank of ``group`` has another part of the model.

    For those who see parameters alone: ``check_replicas``.
    """
    marks: dict[str, tuple[int, ...]] = param.__dict__.setdefault(_MARKS, {})
    marks[what] = tuple(group.ranks)


def is_share(param: Tensor) -> bool:
    """Whether it is part of a split layer's, as far as it says so."""
    return _SHARE in param.__dict__.get(_MARKS, {})


def check_replicas(name: str, param: Tensor, group: Group) -> None:
    """Refuse ranks that have other parts of the model where replicas of one are to be combined.

    Raises:
        InvalidArgumentError: two of them are in ``group``.
    """
    for what, ranks in param.__dict__.get(_MARKS, {}).items():
        others = sorted(set(ranks) & set(group.ranks))
        if len(others) > 1:
            raise InvalidArgumentError(
                f"parameter '{name}' is {what}, of which ranks {others} have different ones, and "
                f"gradients are combined over ranks {sorted(group.ranks)}.\n"
                '  Pass the group of data parallelism: group=mesh["dp"].'
            )


class HeldGroup:
    """Lets copies of a module keep their group, and says why it cannot be pickled."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> HeldGroup:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a module that is split over ranks belongs to its processes: it cannot be pickled.\n"
            "  Save its state_dict(), or tensor_parallel.whole_state_dict(module)."
        )


def named_shares(module: nn.Module) -> Iterator[tuple[str, Tensor, Share]]:
    """Every split parameter within a module, under each of its names."""
    for prefix, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, SplitModule):
            for name, share in part.shares().items():
                full_name = f"{prefix}.{name}" if prefix else name
                yield full_name, part.get_parameter(name), share


def split_group(module: nn.Module) -> Group | None:
    """The group over whose ranks a module's parameters are split; None if it has none.

    Raises:
        InvalidArgumentError: there are several.
    """
    found: dict[tuple[int, ...], Group] = {}
    for part in module.modules():
        if isinstance(part, SplitModule):
            found.setdefault(tuple(part.group.ranks), part.group)
    if len(found) > 1:
        raise InvalidArgumentError(
            "layers of one module are split over different ranks: "
            f"{' and '.join(str(list(ranks)) for ranks in found)}.\n"
            "  Build all of them with the same group."
        )
    return next(iter(found.values()), None)
