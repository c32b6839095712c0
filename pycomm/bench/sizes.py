"""Message sizes, as the command line names them."""

from __future__ import annotations

from pycomm.errors import InvalidArgumentError

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_STEP = 4
_FLOAT32_BYTES = 4


def parse(text: str) -> list[int]:
    """``4:67108864`` counts up by fours from the first to the last; ``4,64,1024`` is a list.

    K, M and G stand for KiB, MiB and GiB.

    Raises:
        InvalidArgumentError: anything else, or a size that is not made of whole float32.
    """
    if ":" not in text:
        return [_bytes(part, text) for part in text.split(",")]
    if text.count(":") > 1:
        raise _wrong(text, "there are two colons")
    first, last = (_bytes(part, text) for part in text.split(":"))
    if first > last:
        raise _wrong(text, "the first is larger than the last")
    sizes = [first]
    while sizes[-1] * _STEP <= last:
        sizes.append(sizes[-1] * _STEP)
    return sizes


def _bytes(part: str, text: str) -> int:
    number = part.strip().upper().removesuffix("IB").removesuffix("B")
    unit = _UNITS.get(number[-1:], 1)
    try:
        nbytes = int(number[:-1] if unit > 1 else number) * unit
    except ValueError:
        raise _wrong(text, f"'{part}' is no number of bytes, nor one of K, M or G") from None
    if nbytes < _FLOAT32_BYTES or nbytes % _FLOAT32_BYTES:
        raise _wrong(text, f"{nbytes} bytes are no whole float32")
    return nbytes


def _wrong(text: str, why: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"bench: --sizes {text}: {why}. Pass FIRST:LAST, such as 4:64M, or a list, such as 4,1K,1M."
    )
