"""Message sizes, as the command line names them."""

from __future__ import annotations

from pycomm.errors import InvalidArgumentError

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STEP = 4


def parse(text: str) -> list[int]:
    """``4:67108864`` counts up by fours from the first to the last; ``4,64,1024`` is a list.

    K, M and G stand for KiB, MiB and GiB.

    Raises:
        InvalidArgumentError: anything else, or a size that is not made of whole float32.
    """
    remedy = "Pass FIRST:LAST, such as 4:64M, or a list, such as 4,1K,1M."
    try:
        if ":" in text:
            first, last = (_bytes(part) for part in text.split(":"))
            sizes = [first]
            while sizes[-1] * _STEP <= last:
                sizes.append(sizes[-1] * _STEP)
            if first > last:
                sizes = []
        else:
            sizes = [_bytes(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"bench: --sizes {text} makes no sense. {remedy}") from None
    wrong = [size for size in sizes if size < 4 or size % 4]
    if wrong or not sizes:
        found = f"{wrong[0]} bytes are no whole float32" if wrong else "it is empty"
        raise InvalidArgumentError(f"bench: --sizes {text}: {found}. {remedy}")
    return sizes


def _bytes(text: str) -> int:
    text = text.strip().upper().removesuffix("IB").removesuffix("B")
    unit = _UNITS.get(text[-1:], 1)
    return int(text[:-1] if unit > 1 else text) * unit
