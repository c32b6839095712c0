"""A barrier through the group's store, which tells which ranks did not come."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from pycomm.errors import CommTimeoutError


def wait_for_all(
    store: Any, rank: int, size: int, number: int, timeout_s: float, wait_all_ranks: bool
) -> None:
    """Wait for all ranks: rank 0 looks who has come, and tells the others.

    Args:
        store: the group's ``torch.distributed.Store``.
        number: how many such barriers the group had before; equal on all ranks.
        wait_all_ranks: rank 0 names all that are missing, not the first one alone.

    Raises:
        CommTimeoutError: on every rank that came, if one did not.
    """
    keys = [f"monitored_barrier/{number}/{other}" for other in range(size)]
    store.set(keys[rank], b"")
    verdict = f"monitored_barrier/{number}/verdict"
    # Rank 0's time may begin last, and it needs some to tell.
    awaited, wait_s = (keys, timeout_s) if rank == 0 else ([verdict], 2 * timeout_s + 5)
    came = _came(store, awaited, wait_s)
    if rank == 0:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        store.set(verdict, json.dumps(missing))
    elif came:
        missing = json.loads(store.get(verdict))
    else:
        missing = [0]
    if missing:
        shown = missing if wait_all_ranks else missing[:1]
        raise CommTimeoutError(
            f"monitored_barrier on rank {rank}: timeout. Rank{'s' * (len(shown) > 1)} "
            # In gloo's words, for which people search their logs.
            f"{', '.join(map(str, shown))} failed to pass monitoredBarrier in {timeout_s:g} s."
            "\n  Read its log first; if it is only slow, raise the timeout."
        )


def _came(store: Any, keys: Sequence[str], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return False
        time.sleep(1e-3)
    return True
