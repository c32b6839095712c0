"""What a rank saw of a case that it ran on gloo and on pycomm."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between two results.

    Attributes:
        first: the path of the first tensor whose bits differ.
        relative: the largest difference of all, by the largest number in the tensor or by 1.
    """

    first: str
    relative: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Written by the rank that ran the case, and read by ``report``.

    Attributes:
        refused: what torch answered on both, where that was expected.
        problems: by backend, what else the case raised.
        difference: None if all bits are equal.
        allowed: the bound on it; 0 where the bits have to be equal.
        compared: the number of tensors.
        seconds: by backend.
    """

    case: str
    summary: str
    rank: int
    world_size: int
    refused: str
    problems: dict[str, str]
    difference: Difference | None
    allowed: float
    compared: int
    seconds: dict[str, float]

    @classmethod
    def read(cls, values: dict) -> Verdict:
        difference = values.pop("difference")
        return cls(difference=difference and Difference(**difference), **values)

    @property
    def failure(self) -> str:
        """Empty if all is well."""
        where = f"{self.case} on rank {self.rank} of {self.world_size}"
        if self.problems:
            return "\n".join(f"{where}, {name}: {text}" for name, text in self.problems.items())
        apart = self.difference
        if apart is not None and not apart.relative <= self.allowed:  # it may be no number
            allowed = f"by {apart.relative:.2g}, and {self.allowed:.2g} is allowed"
            return f"{where}: {apart.first} differs from gloo's, {allowed}"
        return ""
