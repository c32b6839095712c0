"""Ranks laid out along named axes: ``Mesh({"dp": 2, "pp": 4})``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pycomm._core import DType, Group
from pycomm.arguments import integer
from pycomm.errors import InvalidArgumentError
from pycomm.runtime import group_of


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """Which rank stands where; a pure function of the axes and of who shares a host.

    Coordinates run row-major: the last axis is the innermost. Ranks are laid out ordered by host,
    then by rank, so neighbours on the innermost axis share a host wherever its length allows, and
    the axis that talks most (tensor parallelism) belongs there.
    """

    shape: dict[str, int]
    order: tuple[int, ...]  # the rank at each row-major position

    @staticmethod
    def of(axes: Mapping[str, int], hosts: Sequence[Sequence[int]]) -> "MeshLayout":
        """Lay out the ranks of ``hosts`` (ranks of each host); one axis may be -1, the rest.

        Raises:
            InvalidArgumentError: the lengths do not multiply to the number of ranks.
        """
        order = tuple(rank for host in hosts for rank in sorted(host))
        return MeshLayout(_complete(axes, len(order)), order)

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank stands on each axis."""
        position = self.order.index(rank)
        coordinate = {}
        for axis in reversed(self.shape):
            position, coordinate[axis] = divmod(position, self.shape[axis])
        return {axis: coordinate[axis] for axis in self.shape}

    def ranks(self, axes: Sequence[str], rank: int) -> list[int]:
        """The ranks that differ from ``rank`` at most on ``axes``, row-major."""
        here = self.coordinate(rank)
        fixed = [axis for axis in self.shape if axis not in axes]
        return [
            other
            for other, there in ((other, self.coordinate(other)) for other in self.order)
            if all(there[axis] == here[axis] for axis in fixed)
        ]


class Mesh:
    """The ranks of a group along named axes, and a group along each axis.

    ``Mesh({"dp": 2, "pp": 4})`` puts 8 ranks in 2 rows of 4. ``mesh["pp"]`` is the group of this
    rank's row, in which ``rank`` is the coordinate; ``mesh["dp"]`` of its column. Every rank of
    the group makes this call with the same axes. Groups for several axes, ``mesh.group(("dp",
    "pp"))``, are made when first asked for, by all ranks together.

    Args:
        axes: length of each axis, outermost first; their product is the number of ranks. One may
            be -1: as long as the others leave.
        group: the ranks to lay out, the world if None.

    Raises:
        InvalidArgumentError: the product is not the number of ranks; the text says what would be.
        MismatchError: ranks gave different axes, in length or in order.
    """

    def __init__(self, axes: Mapping[str, int], *, group: Group | None = None) -> None:
        self._group = group_of(group, "Mesh")
        try:
            self._layout = MeshLayout.of(axes, self._group.hosts)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"Mesh on rank {self._group.rank}: {error}") from None
        self._groups: dict[tuple[str, ...], Group] = {}
        for axis in self.shape:
            self._make((axis,))

    @property
    def shape(self) -> dict[str, int]:
        """Length of each axis, outermost first."""
        return dict(self._layout.shape)

    @property
    def coordinate(self) -> dict[str, int]:
        """Where this rank stands on each axis."""
        return self._layout.coordinate(self._group.rank)

    def ranks(self, axis: str) -> list[int]:
        """The ranks along ``axis`` through this rank, numbered as in the group laid out."""
        return self._layout.ranks(self._known(axis), self._group.rank)

    def __getitem__(self, axis: str) -> Group:
        """This rank's group along one axis; its rank there is its coordinate."""
        return self.group((axis,))

    def group(self, axes: str | Sequence[str]) -> Group:
        """This rank's group along several axes: the ranks that share the remaining coordinates.

        The first call for several axes makes the group, so every rank makes it; later ones and
        those for one axis return what is there. The order of ``axes`` does not matter.
        """
        names = self._known(axes)
        return self._groups.get(names) or self._make(names)

    def __repr__(self) -> str:
        return f"Mesh({self.shape}, coordinate={self.coordinate})"

    def _known(self, axes: str | Sequence[str]) -> tuple[str, ...]:
        asked = (axes,) if isinstance(axes, str) else tuple(axes)
        unknown = [axis for axis in asked if axis not in self._layout.shape]
        if unknown or not asked:
            raise InvalidArgumentError(
                f"Mesh on rank {self._group.rank}: no axis {', '.join(map(repr, unknown)) or ''}; "
                f"there are {', '.join(map(repr, self._layout.shape))}."
            )
        return tuple(axis for axis in self._layout.shape if axis in asked)

    def _make(self, axes: tuple[str, ...]) -> Group:
        ranks = self._layout.ranks(axes, self._group.rank)
        # What the mesh looks like is part of the operation's name, hence of its signature: ranks
        # that disagree get a MismatchError instead of odd groups.
        name = f"Mesh({self.shape}).group({axes})"
        self._group.all_gather(0, 0, 0, DType.UINT8, name=name)
        # All rows at once: the lowest rank names the row, the position in it is the key.
        made = self._group.split(min(ranks), ranks.index(self._group.rank))
        assert made is not None  # every rank has a color
        self._groups[axes] = made
        return made


def _complete(axes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The axes with -1 replaced, or why they do not fit."""
    if not isinstance(axes, Mapping):
        raise InvalidArgumentError(f'axes is {axes!r}.\n  Pass a dict, such as {{"dp": -1}}.')
    if not axes:
        raise InvalidArgumentError('no axes.\n  Pass at least one, such as {"dp": -1}.')
    for axis, given in axes.items():
        number = integer(given)
        if not isinstance(axis, str) or number is None or (number < 1 and number != -1):
            raise InvalidArgumentError(
                f"axis {axis!r} has length {given!r}.\n"
                "  Pass names with positive lengths; one may be -1, the rest."
            )
    axes = {axis: int(length) for axis, length in axes.items()}
    open_axes = [axis for axis, length in axes.items() if length == -1]
    if len(open_axes) > 1:
        raise InvalidArgumentError(
            f"axes {open_axes} are all -1, and only one can be the rest.\n"
            "  Give the others a length."
        )
    known = math.prod(length for length in axes.values() if length != -1)
    if open_axes and ranks % known == 0:
        return {axis: ranks // known if length == -1 else length for axis, length in axes.items()}
    if not open_axes and known == ranks:
        return dict(axes)
    written = " x ".join(f"{axis}={length}" for axis, length in axes.items())
    raise InvalidArgumentError(
        f"{written} does not make {ranks} ranks: "
        + (f"{ranks} is no multiple of {known}." if open_axes else f"it makes {known}.")
        + f"\n  {_suggestion(axes, ranks, known)}"
    )


def _suggestion(axes: Mapping[str, int], ranks: int, known: int) -> str:
    """Another length for one axis that makes the product right, if there is one."""
    for axis, length in axes.items():
        others = known // length if length != -1 else known
        if ranks % others == 0:
            wanted = {**axes, axis: ranks // others}
            if -1 not in wanted.values():
                return f"Use {wanted}, or start {known} ranks."
    return f"Start {known} ranks, or choose lengths whose product is {ranks}."
