"""What an exception says, in a line that may stand in one of ours."""

from __future__ import annotations

import re


def reason_of(error: BaseException) -> str:
    """The first line of its text after its type; the type where there is no text.

    Torch's own text on loading values begins with the advice to run the code in them, which is
    never passed on: what was refused is said in our words.
    """
    refused = refused_type(error)
    if refused:
        return f"there is a {refused} in it, which weights_only=True refuses"
    kind = type(error).__name__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if "weights_only" in text or "Weights only" in text:
        _, _, text = text.partition("WeightsUnpickler error:")
        text = text.split("Please ")[0].strip()
        if not text or "weights_only" in text.splitlines()[0]:
            text = "torch cannot load it with weights_only=True"
    return f"{kind}: {text.splitlines()[0].rstrip('. ')}" if text else kind


def refused_type(error: BaseException) -> str | None:
    """The type that ``torch.load(weights_only=True)`` did not take, if that is what went wrong."""
    found = re.search(r"GLOBAL (\w[\w.]*\w)", str(error))
    return found.group(1) if found and "weights_only" in str(error) else None


def disk_error(error: BaseException | None) -> OSError | None:
    """The system's error behind one; torch raises its own where the disk is full."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error
