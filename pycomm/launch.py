"""Which launcher started this process; ``pycomm_launch.launchers`` finds out."""

from collections.abc import Mapping

from pycomm.errors import InvalidArgumentError
from pycomm_launch import launchers
from pycomm_launch.launchers import Launch, Launcher, Meeting

__all__ = ["Launch", "Launcher", "Meeting", "detect"]


def detect(environ: Mapping[str, str]) -> Launch:
    """Find the innermost launcher in ``environ``.

    Raises:
        InvalidArgumentError: the launcher's variables are incomplete or make no sense.
    """
    try:
        return launchers.detect(environ)
    except launchers.LaunchError as mistake:
        raise InvalidArgumentError(str(mistake)) from None
