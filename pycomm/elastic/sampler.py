"""Samples in batches that ranks share out, however many there are at the time."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import Sampler as TorchSampler

from pycomm import runtime
from pycomm.errors import InvalidArgumentError
from pycomm.shares import bounds


class Sampler(TorchSampler[list[int]]):
    """A batch sampler: each epoch is one order of all samples, and each step takes the next of it.

    ::

        loader = DataLoader(data, batch_sampler=sampler, num_workers=2)

    Which samples a step takes does not depend on the ranks; they share them out. So when ranks are
    lost or come in the middle of an epoch, what is left of it is simply what comes next: no sample
    is left out or taken twice within an epoch, as counted by steps that were committed.

    Args:
        samples: how many there are, or a dataset.
        batch: samples that all ranks together take a step. The last one of an epoch may have less.
        shuffle: a new order each epoch, which follows from ``seed`` and the epoch alone.

    All but ``samples`` go with the state: a training that is resumed goes on with the batch, the
    seed and the shuffling that it had, whatever the program passes now.

    Raises:
        InvalidArgumentError: a number that makes no sense.
    """

    def __init__(
        self, samples: int | Sized, batch: int, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        self.samples = samples if isinstance(samples, int) else len(samples)
        self.batch = batch
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.done = 0
        """Samples of this epoch that steps have taken."""
        # The batch and the ranks it was for, before it was rescaled; 0: it never was.
        self._first_batch, self._first_ranks = 0, 0
        for name, value in (("samples", self.samples), ("batch", batch)):
            if not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(f"Sampler: {name} is {value!r}. Pass at least 1.")
        if not isinstance(seed, int) or not isinstance(shuffle, bool):
            raise InvalidArgumentError(
                f"Sampler: seed is {seed!r} and shuffle {shuffle!r}. Pass an int and a bool."
            )

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's samples of each step that is left of the epoch."""
        rank, size = runtime.rank(), runtime.size()
        if self.batch < size:
            raise InvalidArgumentError(
                f"Sampler on rank {rank}: a batch of {self.batch} for {size} ranks.\n"
                "  Pass at least one sample for each."
            )
        order, at = self._order(), self.done
        while at < self.samples:
            end = min(at + self.batch, self.samples)
            begin_own, end_own = _share(end - at, size, rank)
            yield order[at + begin_own : at + end_own]
            at = end

    def __len__(self) -> int:
        """Steps left of this epoch."""
        return -(-(self.samples - self.done) // self.batch)

    @property
    def weight(self) -> float:
        """What to multiply this step's mean loss with, so that the ranks' average is the batch's.

        1 where all ranks have as many samples.
        """
        taken = min(self.batch, self.samples - self.done)
        size = runtime.size()
        begin, end = _share(taken, size, runtime.rank())
        return (end - begin) * size / taken if taken >= size else 1.0

    def advance(self) -> bool:
        """A step is done, on all ranks. Returns whether it was the last one of the epoch.

        Call it before ``State.commit()``. The next iteration begins the next epoch then.
        """
        self.done = min(self.done + self.batch, self.samples)
        if self.done < self.samples:
            return False
        self.epoch, self.done = self.epoch + 1, 0
        return True

    def rescale(self, before: int, now: int) -> None:
        """Let each of ``now`` ranks take as much as each of ``before`` did.

        Rounded from the batch that there was at first, so that it comes back when the ranks do.
        """
        if not self._first_ranks or self.batch != self._batch_of(before):  # or set since
            self._first_batch, self._first_ranks = self.batch, before
        self.batch = self._batch_of(now)

    def _batch_of(self, ranks: int) -> int:
        return max(1, round(self._first_batch * ranks / self._first_ranks))

    def state_dict(self) -> dict[str, Any]:
        """How far it is; the same on all ranks."""
        return {
            "samples": self.samples,
            "batch": self.batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "done": self.done,
            "first_batch": self._first_batch,
            "first_ranks": self._first_ranks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the batch, the seed and the shuffling of there.

        Raises:
            InvalidArgumentError: it is of another number of samples.
        """
        if state["samples"] != self.samples:
            raise InvalidArgumentError(
                f"Sampler: there are {self.samples} samples here and {state['samples']} in the "
                "state that is loaded.\n  Go on with the same dataset, or from a new folder."
            )
        self.batch, self.seed, self.shuffle = state["batch"], state["seed"], state["shuffle"]
        self.epoch, self.done = state["epoch"], state["done"]
        self._first_batch, self._first_ranks = state["first_batch"], state["first_ranks"]

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return order


def _share(taken: int, size: int, rank: int) -> tuple[int, int]:
    """Which of a step's samples are this rank's.

    At the end of an epoch there may be fewer samples than ranks, and no rank can do without:
    each takes them all then, and the average over the ranks is that of one.
    """
    return bounds(taken, size, rank) if taken >= size else (0, taken)
