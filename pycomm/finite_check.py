"""Which gradients are NaN or infinite, and who brought that: the same answer on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pycomm._core import Extent, Group
from pycomm.errors import NonFiniteError, NonFiniteGradient
from pycomm.objects import all_gather_bytes

_CALL = "check_finite"
_NAMED = 8


def find_nonfinite(
    parameters: Sequence[tuple[str, int | None]],
    brought: Sequence[Extent],
    is_result_nonfinite: Callable[[int], bool],
    group: Group,
    *,
    summed: bool = True,
) -> tuple[NonFiniteGradient, ...]:
    """Look closer, where it is known that something may not be finite. Collective.

    Args:
        parameters: name and bucket of each, the same on all ranks.
        brought: what this rank's gradients were before the reduction.
        is_result_nonfinite: whether what this rank has of a parameter's reduced gradient holds NaN
            or infinity. Asked where every rank's gradient was finite and the result may not be.
        summed: the result is the sum, or the mean. A compressor's may be anything.

    Cost: two all-gathers of a byte for each parameter.
    """
    everyones = all_gather_bytes(_CALL, bytes(brought), group)  # a byte for each parameter
    by_parameter = list(zip(*everyones, strict=True))
    culprits = [
        tuple(rank for rank, extent in enumerate(extents) if extent == Extent.NON_FINITE)
        for extents in by_parameter
    ]
    overflowed = bytes(
        (Extent.LARGE in extents or not summed)
        and Extent.NON_FINITE not in extents
        and is_result_nonfinite(index)
        for index, extents in enumerate(by_parameter)
    )
    everywhere = zip(*all_gather_bytes(_CALL, overflowed, group), strict=True)
    return tuple(
        NonFiniteGradient(name, ranks, bucket)
        for (name, bucket), ranks, overflows in zip(parameters, culprits, everywhere, strict=True)
        if ranks or any(overflows)
    )


def nonfinite_error(
    gradients: Sequence[NonFiniteGradient], step: int, group: Group
) -> NonFiniteError:
    """For all ranks alike.

    Args:
        gradients: one at least.
        step: their number, from 1.
    """
    lines = [f"the gradients of step {step} are not finite, on rank {group.rank} as on all:"]
    lines += [f"  {gradient}" for gradient in gradients[:_NAMED]]
    if len(gradients) > _NAMED:
        lines.append(f"  and {len(gradients) - _NAMED} more (error.gradients has all)")
    ranks = sorted({rank for gradient in gradients for rank in gradient.ranks})
    if ranks:
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        lines.append(f"  Look at the batch and the loss of {where}.")
    else:
        lines.append("  Scale the loss down, or average (op=AVG) in a wider dtype.")
    lines.append(
        "  The group stays usable: optimizer.zero_grad() forgets these gradients, and "
        'check_finite="skip" skips such steps on all ranks.'
    )
    return NonFiniteError("\n".join(lines), gradients)
