"""A barrier through the group's store, which tells which ranks did not come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch.distributed import DistError

from pycomm.errors import CommError, CommTimeoutError, PeerLostError
from pycomm.rendezvous import store_is_there

_CALL = "monitored_barrier"
_POLL_S = 1e-3
_CHECK_S = 0.05  # of who is still alive


class MonitoredBarrier:
    """One of a group, on one rank: rank 0 looks who has come, and tells the others.

    A rank that is gone is noticed by the ranks of its host, while they wait; they tell the others.

    Args:
        store: the group's ``torch.distributed.Store``.
        number: how many such barriers the group had before; equal on all ranks.
        check_present: raises if one of these ranks will never come.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        number: int,
        check_present: Callable[[Sequence[int], str], None],
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._check_present = check_present
        self._keys = [f"{_CALL}/{number}/{other}" for other in range(size)]
        self._verdict = f"{_CALL}/{number}/verdict"
        self._loss = f"{_CALL}/{number}/loss"

    def wait(self, timeout_s: float, wait_all_ranks: bool) -> None:
        """
        Args:
            wait_all_ranks: rank 0 names all that are missing, not the first one alone.

        Raises:
            CommTimeoutError: on every rank that came, if one did not.
            PeerLostError: likewise, if one is gone. MismatchError: it has left the job.
        """
        with store_is_there(_CALL, self._rank, self._size):
            try:
                missing = self._missing(timeout_s)
            except DistError:
                self._check_others()  # who keeps the store may be the one that is gone
                raise
        if missing:
            shown = missing if wait_all_ranks else missing[:1]
            raise CommTimeoutError(
                f"{_CALL} on rank {self._rank}: timeout. Rank{'s' * (len(shown) > 1)} "
                # In gloo's words, for which people search their logs.
                f"{', '.join(map(str, shown))} failed to pass monitoredBarrier in {timeout_s:g} s."
                "\n  Read its log first; if it is only slow, raise the timeout."
            )

    def _missing(self, timeout_s: float) -> list[int]:
        self._store.set(self._keys[self._rank], b"")
        if self._rank == 0:
            self._came(self._keys, timeout_s)
            missing = [
                other for other, key in enumerate(self._keys) if not self._store.check([key])
            ]
            self._store.set(self._verdict, json.dumps(missing))
            return missing
        # Rank 0's time may begin last, and it needs some to tell.
        if not self._came([self._verdict], 2 * timeout_s + 5):
            return [0]
        told: list[int] = json.loads(self._store.get(self._verdict))
        return told

    def _came(self, keys: Sequence[str], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        next_check = time.monotonic() + _CHECK_S
        while not self._store.check(list(keys)):
            now = time.monotonic()
            if now > deadline:
                return False
            if now > next_check:
                self._look_for_losses(keys)
                next_check = now + _CHECK_S
            time.sleep(_POLL_S)
        return True

    def _look_for_losses(self, awaited: Sequence[str]) -> None:
        try:
            self._check_others()
        except CommError as error:
            if self._store.check(list(awaited)):
                return  # all had come, and who is gone, or leaves, went on from here
            self._store.set(self._loss, str(error))
            raise
        if self._store.check([self._loss]):
            told = self._store.get(self._loss).decode()
            raise PeerLostError(
                f"{_CALL} on rank {self._rank}: another host's rank has noticed:\n  {told}"
            )

    def _check_others(self) -> None:
        self._check_present([other for other in range(self._size) if other != self._rank], _CALL)
