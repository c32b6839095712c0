"""gloo, through torch.distributed."""

from __future__ import annotations

from .c10d import C10dContender
from .collectives import main

if __name__ == "__main__":
    main(C10dContender("gloo", "gloo"))
