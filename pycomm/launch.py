"""Which launcher started this process; ``pycomm_launch.launchers`` finds out."""

import os
from collections.abc import Mapping

from pycomm.errors import InvalidArgumentError
from pycomm_launch import launchers
from pycomm_launch.launchers import Launch, Launcher, Meeting

__all__ = ["FOLDER", "Launch", "Launcher", "Meeting", "detect"]


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return "/"


FOLDER = _working_folder()
"""Where this process was started, unless it had gone elsewhere before it imported pycomm."""


def detect(environ: Mapping[str, str]) -> Launch:
    """Find the innermost launcher in ``environ``.

    Raises:
        InvalidArgumentError: the launcher's variables are incomplete or make no sense.
    """
    try:
        return launchers.detect(environ)
    except launchers.LaunchError as mistake:
        raise InvalidArgumentError(str(mistake)) from None
