"""Where a rank is, for errors."""

from __future__ import annotations

import os
import socket


def host() -> str:
    """The name of this rank's."""
    return os.environ.get("PYCOMM_HOST") or socket.gethostname()
