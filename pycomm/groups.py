"""Groups of some of the ranks.

A group numbers its ranks from 0: ``group.rank`` is this process's number in it, ``group.ranks``
the world rank of each. Every ``root``, ``src`` and ``dst`` of a call counts in the call's group.
"""

from collections.abc import Iterable

from pycomm._core import Group
from pycomm.arguments import rank_of, refuse
from pycomm.runtime import group_of


def new_group(ranks: Iterable[int], *, group: Group | None = None) -> Group | None:
    """A group of ``ranks``, which get the ranks 0, 1, ... in it in the order given.

    Every rank of ``group`` makes this call with the same list, those outside the list too.
    Groups are independent of each other: operations on several of them may run at once, from
    several threads. But a process makes one group at a time, in the same order everywhere.

    Args:
        ranks: ranks of ``group`` (world ranks if None), each once.
        group: the group to take them from, the world if None.

    Returns:
        The group, or None on a rank that is not in the list.

    Raises:
        InvalidArgumentError: an empty list, a rank twice or one that ``group`` does not have. Found
            before anything is sent; the group stays usable.
        MismatchError: ranks gave different lists. ``group`` is finished.
        CommTimeoutError, PeerLostError: ``group`` is finished.

    Memory: at most 8 MiB of staging on each member, given back when the group is dropped.
    """
    group = group_of(group)
    if not isinstance(ranks, Iterable):
        refuse("new_group", group, f"ranks is {ranks!r}.\n  Pass a list of ranks, such as [0, 1].")
    return group.new_group([rank_of("new_group", "one of ranks", rank, group) for rank in ranks])
